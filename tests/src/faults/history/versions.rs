//! Rules of single keys: who may replace what, and what a Get may return.

use std::collections::BTreeMap;

use super::{Change, History, Outcome, Revision, Snapshot, Violation, Write, check::Timeline};

/// What each key was, from each of its revisions on; `None`: not there.
struct Versions<'a>(BTreeMap<&'a str, BTreeMap<Revision, Option<&'a str>>>);

impl<'a> Versions<'a> {
    fn new(base: &'a Snapshot, timeline: &'a Timeline) -> Self {
        let mut versions: BTreeMap<&str, BTreeMap<Revision, Option<&str>>> = BTreeMap::new();
        for (key, (value, revision)) in &base.objects {
            versions.entry(key).or_default().insert(*revision, Some(value));
        }
        for (revision, (key, change)) in timeline {
            let value = match change {
                Change::Put(value) => Some(value.as_str()),
                Change::Delete => None,
            };
            versions.entry(key).or_default().insert(*revision, value);
        }
        Self(versions)
    }

    /// What the key was before a revision, as a write names it: the revision of its last write, or 0.
    fn before(&self, key: &str, revision: Revision) -> Revision {
        let last = self.of(key).range(..revision).next_back();
        last.filter(|(_, value)| value.is_some()).map_or(0, |(at, _)| *at)
    }

    /// The key's first revision after another.
    fn after(&self, key: &str, revision: Revision) -> Option<Revision> {
        self.of(key).range(revision + 1..).next().map(|(at, _)| *at)
    }

    /// Where this value was written.
    fn revision_of(&self, key: &str, value: &str) -> Option<Revision> {
        let mut versions = self.of(key).iter();
        versions.find(|(_, found)| **found == Some(value)).map(|(at, _)| *at)
    }

    /// Whether the key was not there at this revision, or at some time after it.
    fn is_absent_since(&self, key: &str, revision: Revision) -> bool {
        let mut later = self.of(key).range(revision + 1..);
        let at_first = self.of(key).range(..=revision).next_back();
        at_first.is_none_or(|(_, value)| value.is_none()) || later.any(|(_, value)| value.is_none())
    }

    fn of(&self, key: &str) -> &BTreeMap<Revision, Option<&'a str>> {
        static NEVER: BTreeMap<Revision, Option<&str>> = BTreeMap::new();
        self.0.get(key).unwrap_or(&NEVER)
    }
}

/// Adds what contradicts the rules.
pub(super) fn check(history: &History, base: &Snapshot, timeline: &Timeline, found: &mut Vec<Violation>) {
    let versions = Versions::new(base, timeline);
    for write in &history.writes {
        found.extend(replaces_another(write, &versions));
    }
    reads_are_fresh(history, &versions, found);
}

/// Of the writes that depend on one revision of a key, one wins: it follows that revision at once, and who is refused was too late.
fn replaces_another(write: &Write, versions: &Versions<'_>) -> Option<Violation> {
    let base = write.base?;
    let key = write.key.clone();
    let at = match (&write.outcome, &write.change) {
        (Outcome::Acknowledged(revision), _) => Some(*revision),
        (Outcome::Unknown, Change::Put(value)) => Some(versions.revision_of(&key, value)?),
        (Outcome::Unknown, Change::Delete) => return None,
        (Outcome::Refused, _) => None,
    };
    match at {
        Some(revision) => {
            let replaced = versions.before(&key, revision);
            (replaced != base).then_some(Violation::Overwrote {
                key,
                base,
                revision,
                replaced,
            })
        }
        None if versions.after(&key, base).is_none() => Some(Violation::NoWinner { key, base }),
        None => None,
    }
}

/// What began after a write was acknowledged, or after a Get returned one, returns that or what came after it.
fn reads_are_fresh(history: &History, versions: &Versions<'_>, found: &mut Vec<Violation>) {
    // Of each key: when a revision was known to somebody, and the highest that was by then.
    let mut known: BTreeMap<&str, Vec<(u64, Revision)>> = BTreeMap::new();
    for write in &history.writes {
        if let Outcome::Acknowledged(revision) = write.outcome {
            known.entry(&write.key).or_default().push((write.ended, revision));
        }
    }
    for read in &history.reads {
        if let Some((_, revision)) = read.found {
            known.entry(&read.key).or_default().push((read.ended, revision));
        }
    }
    for moments in known.values_mut() {
        moments.sort_unstable();
        let mut highest = 0;
        for (_, revision) in moments {
            highest = highest.max(*revision);
            *revision = highest;
        }
    }
    for read in &history.reads {
        let moments = known.get(read.key.as_str()).map_or(&[][..], Vec::as_slice);
        let earlier = moments.partition_point(|(ended, _)| *ended < read.begun);
        let floor = earlier.checked_sub(1).map_or(0, |last| moments[last].1);
        let is_fresh = match &read.found {
            Some((value, revision)) => {
                if versions.of(&read.key).get(revision) != Some(&Some(value)) {
                    found.push(Violation::Ghost {
                        key: read.key.clone(),
                        change: Change::Put(value.clone()),
                        revision: *revision,
                    });
                }
                *revision >= floor
            }
            None => versions.is_absent_since(&read.key, floor),
        };
        if !is_fresh {
            found.push(Violation::StaleRead {
                key: read.key.clone(),
                returned: read.found.as_ref().map(|(_, revision)| *revision),
                known: floor,
            });
        }
    }
}
