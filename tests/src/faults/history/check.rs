//! The model: one sequence of revisions that everything recorded has to fit.

use std::collections::{BTreeMap, BTreeSet};

use super::{Change, History, Kind, Outcome, Revision, Seen, Snapshot, Violation, Write, versions};

/// What every revision changed, as far as anybody was told.
pub(super) type Timeline = BTreeMap<Revision, (String, Change)>;

/// Everything that contradicts one ordered, unique, complete sequence of revisions.
pub fn check(history: &History) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut timeline = Timeline::new();
    let mut stories = Vec::new();
    for (watcher, story) in history.watchers.iter().enumerate() {
        stories.push(read(watcher, story, &mut timeline, &mut found));
    }
    let base = lists(history)
        .min_by_key(|list| list.revision)
        .cloned()
        .unwrap_or_default();
    if let Some(after) = uncovered(&stories, base.revision, history.end.revision) {
        found.push(Violation::Uncovered { after });
        return found;
    }
    writes_are_there(history, &base, &timeline, &mut found);
    nothing_else_is_there(history, &timeline, &mut found);
    order_is_kept(history, &timeline, &mut found);
    everybody_was_told(&stories, &timeline, &mut found);
    lists_fit(history, &base, &timeline, &mut found);
    versions::check(history, &base, &timeline, &mut found);
    found
}

/// What watchers began with.
fn lists(history: &History) -> impl Iterator<Item = &Snapshot> {
    history.watchers.iter().flatten().filter_map(|seen| match seen {
        Seen::Listed(snapshot) => Some(snapshot),
        _ => None,
    })
}

/// What one watcher followed and was told.
#[derive(Default)]
struct Story {
    /// Intervals (after, up to and including).
    followed: Vec<(Revision, Revision)>,
    told: BTreeSet<Revision>,
}

/// Goes through a watcher's story: its order, its kinds; adds its events to the timeline.
fn read(watcher: usize, story: &[Seen], timeline: &mut Timeline, found: &mut Vec<Violation>) -> Story {
    let mut at: Revision = 0;
    let mut present: BTreeSet<String> = BTreeSet::new();
    let mut result = Story::default();
    for seen in story {
        let after = at;
        let revision = match seen {
            Seen::Listed(snapshot) => {
                present = snapshot.objects.keys().cloned().collect();
                result.followed.push((snapshot.revision, snapshot.revision));
                snapshot.revision
            }
            Seen::Bookmark(revision) | Seen::Resumed(revision) => *revision,
            Seen::Event {
                revision,
                key,
                kind,
                change,
            } => {
                let revision = *revision;
                let fits = match kind {
                    Kind::Added => present.insert(key.clone()),
                    Kind::Modified => present.contains(key),
                    Kind::Deleted => present.remove(key),
                };
                if !fits {
                    let (key, kind) = (key.clone(), *kind);
                    found.push(Violation::WrongKind {
                        watcher,
                        revision,
                        key,
                        kind,
                    });
                }
                if revision == after {
                    found.push(Violation::OutOfOrder {
                        watcher,
                        revision,
                        after,
                    });
                }
                result.told.insert(revision);
                let told = (key.clone(), change.clone());
                let one = timeline.entry(revision).or_insert_with(|| told.clone()).clone();
                if one != told {
                    found.push(Violation::Disagree {
                        revision,
                        one,
                        other: told,
                    });
                }
                revision
            }
        };
        if revision < after {
            found.push(Violation::OutOfOrder {
                watcher,
                revision,
                after,
            });
        }
        at = revision.max(after);
        if let Some(last) = result.followed.last_mut() {
            last.1 = at;
        }
    }
    result
}

/// The first revision between two after which no watcher followed.
fn uncovered(stories: &[Story], from: Revision, to: Revision) -> Option<Revision> {
    let mut intervals: Vec<(Revision, Revision)> = stories.iter().flat_map(|story| story.followed.clone()).collect();
    intervals.sort_unstable();
    let mut reached = from;
    for (after, until) in intervals {
        if after > reached {
            break;
        }
        reached = reached.max(until);
    }
    (reached < to).then_some(reached)
}

fn writes_are_there(history: &History, base: &Snapshot, timeline: &Timeline, found: &mut Vec<Violation>) {
    for write in &history.writes {
        let Outcome::Acknowledged(revision) = write.outcome else {
            continue;
        };
        let (key, change) = (write.key.clone(), write.change.clone());
        if revision > base.revision && timeline.get(&revision) != Some(&(key.clone(), change.clone())) {
            found.push(Violation::Lost { key, change, revision });
        }
    }
}

/// Every change was written by somebody who was not refused, and once.
fn nothing_else_is_there(history: &History, timeline: &Timeline, found: &mut Vec<Violation>) {
    let mut puts: BTreeMap<(&str, &str), Option<Revision>> = BTreeMap::new();
    let mut removals: BTreeMap<&str, usize> = BTreeMap::new();
    let mut acknowledged: BTreeSet<Revision> = BTreeSet::new();
    for write in &history.writes {
        match (&write.change, &write.outcome) {
            (_, Outcome::Refused) => {}
            (Change::Put(value), _) => drop(puts.insert((&write.key, value), None)),
            (Change::Delete, Outcome::Unknown) => *removals.entry(&write.key).or_default() += 1,
            (Change::Delete, Outcome::Acknowledged(revision)) => drop(acknowledged.insert(*revision)),
        }
    }
    for (&revision, (key, change)) in timeline {
        let ghost = Violation::Ghost {
            key: key.clone(),
            change: change.clone(),
            revision,
        };
        match change {
            Change::Put(value) => match puts.get_mut(&(key.as_str(), value.as_str())) {
                None => found.push(ghost),
                Some(Some(first)) => found.push(Violation::Twice {
                    key: key.clone(),
                    change: change.clone(),
                    revisions: (*first, revision),
                }),
                Some(seen) => *seen = Some(revision),
            },
            // An acknowledged removal is held against its revision elsewhere; any other needs an unknown one for itself.
            Change::Delete if acknowledged.contains(&revision) => {}
            Change::Delete => match removals.get_mut(key.as_str()) {
                Some(left) if *left > 0 => *left -= 1,
                _ => found.push(ghost),
            },
        }
    }
}

/// What began after an acknowledgement has a greater revision.
fn order_is_kept(history: &History, timeline: &Timeline, found: &mut Vec<Violation>) {
    let revisions: BTreeMap<&(String, Change), Revision> = timeline.iter().map(|(at, what)| (what, *at)).collect();
    let revision_of = |write: &Write| match (&write.outcome, &write.change) {
        (Outcome::Acknowledged(revision), _) => Some(*revision),
        (Outcome::Unknown, Change::Put(_)) => revisions.get(&(write.key.clone(), write.change.clone())).copied(),
        _ => None,
    };
    let (mut ended, mut begun) = (Vec::new(), Vec::new());
    for write in &history.writes {
        let Some(revision) = revision_of(write) else { continue };
        begun.push((write.begun, revision));
        if matches!(write.outcome, Outcome::Acknowledged(_)) {
            ended.push((write.ended, revision));
        }
    }
    ended.sort_unstable();
    begun.sort_unstable();
    let (mut earlier, mut next) = (0, 0);
    for (at, later) in begun {
        while let Some((end, revision)) = ended.get(next)
            && *end < at
        {
            earlier = earlier.max(*revision);
            next += 1;
        }
        if later <= earlier {
            found.push(Violation::Reordered { earlier, later });
        }
    }
}

fn everybody_was_told(stories: &[Story], timeline: &Timeline, found: &mut Vec<Violation>) {
    for (watcher, story) in stories.iter().enumerate() {
        for (after, until) in story.followed.iter().filter(|(after, until)| after < until) {
            let followed = timeline.range(after + 1..=*until).map(|(revision, _)| *revision);
            let missed = followed.filter(|revision| !story.told.contains(revision));
            found.extend(missed.map(|revision| Violation::Missed { watcher, revision }));
        }
    }
}

/// Every list is the sum of the changes before it.
fn lists_fit(history: &History, base: &Snapshot, timeline: &Timeline, found: &mut Vec<Violation>) {
    for list in lists(history).chain([&history.end]) {
        let mut expected = base.objects.clone();
        for (revision, (key, change)) in timeline.range(..=list.revision).filter(|(at, _)| **at > base.revision) {
            match change {
                Change::Put(value) => drop(expected.insert(key.clone(), (value.clone(), *revision))),
                Change::Delete => drop(expected.remove(key)),
            }
        }
        let keys: BTreeSet<&String> = expected.keys().chain(list.objects.keys()).collect();
        for key in keys {
            let (listed, expected) = (list.objects.get(key), expected.get(key));
            if listed != expected {
                let text = |found: Option<&(String, Revision)>| found.map(|(value, at)| format!("{value} of {at}"));
                let (listed, expected) = (text(listed), text(expected));
                let (revision, key) = (list.revision, key.clone());
                found.push(Violation::WrongSnapshot {
                    revision,
                    key,
                    listed,
                    expected,
                });
            }
        }
    }
}
