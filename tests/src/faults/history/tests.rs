use std::collections::BTreeMap;

use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;

/// A store that keeps its word, and what writers and watchers with bad luck record of it.
fn lawful(seed: u64) -> History {
    let mut random = StdRng::seed_from_u64(seed);
    let (mut objects, mut log) = (BTreeMap::new(), Vec::new());
    let (mut revision, mut clock) = (random.random_range(1..50), 0);
    let mut history = History::default();
    let first = revision;
    // What the key that all change was, from one write to the next.
    let mut bases = vec![0];
    for number in 0..random.random_range(20..60) {
        let contends = random.random_bool(0.3);
        let key = if contends {
            CONTENDED.to_owned()
        } else {
            format!("key{}", random.random_range(0..4))
        };
        let removes = !contends && random.random_bool(0.25) && objects.contains_key(&key);
        let change = if removes {
            Change::Delete
        } else {
            Change::Put(format!("value{number}"))
        };
        let begun = clock;
        clock += 2;
        // Other parts of the store are written too.
        revision += random.random_range(1..3);
        let base = contends.then(|| bases[random.random_range(bases.len().saturating_sub(3)..bases.len())]);
        let wins = base.is_none() || base == bases.last().copied();
        let happens = wins && (contends || random.random_bool(0.85));
        let outcome = match (happens, random.random_bool(0.2)) {
            (_, true) => Outcome::Unknown,
            (true, false) => Outcome::Acknowledged(revision),
            (false, false) => Outcome::Refused,
        };
        if happens {
            let kind = match (&change, objects.contains_key(&key)) {
                (Change::Delete, _) => Kind::Deleted,
                (Change::Put(_), true) => Kind::Modified,
                (Change::Put(_), false) => Kind::Added,
            };
            if contends {
                bases.push(revision);
            }
            match &change {
                Change::Put(value) => drop(objects.insert(key.clone(), (value.clone(), revision))),
                Change::Delete => drop(objects.remove(&key)),
            }
            log.push((revision, key.clone(), kind, change.clone(), objects.clone()));
        }
        let ended = begun + 1;
        history.writes.push(Write {
            key,
            change,
            base,
            begun,
            ended,
            outcome,
        });
        history.reads.extend(read(&mut random, &mut clock, &objects));
    }
    history.end = Snapshot { revision, objects };
    for watcher in 0..3 {
        history
            .watchers
            .push(story(&mut random, first, revision, &log, watcher == 2));
    }
    history
}

/// The key whose writers all depend on what they read.
const CONTENDED: &str = "contended";

/// Now and then somebody reads a key, which may be one that is not there.
fn read(random: &mut StdRng, clock: &mut u64, objects: &BTreeMap<String, (String, Revision)>) -> Option<Read> {
    if random.random_bool(0.6) {
        return None;
    }
    let key = match random.random_range(0..5) {
        4 => CONTENDED.to_owned(),
        number => format!("key{number}"),
    };
    let begun = *clock;
    *clock += 2;
    let found = objects.get(&key).cloned();
    let ended = begun + 1;
    Some(Read {
        key,
        begun,
        ended,
        found,
    })
}

type Log = [(Revision, String, Kind, Change, BTreeMap<String, (String, Revision)>)];

/// One watcher's story: it resumes now and then; if it may, it is compacted away once and lists anew.
fn story(random: &mut StdRng, first: Revision, last: Revision, log: &Log, lists_anew: bool) -> Vec<Seen> {
    let mut told = vec![Seen::Listed(Snapshot {
        revision: first,
        objects: BTreeMap::new(),
    })];
    let mut at = first;
    let gap = if lists_anew { log.len() / 3..log.len() / 2 } else { 0..0 };
    for (index, (revision, key, kind, change, objects)) in log.iter().enumerate() {
        if gap.contains(&index) {
            if index + 1 == gap.end {
                told.push(Seen::Listed(Snapshot {
                    revision: *revision,
                    objects: objects.clone(),
                }));
                at = *revision;
            }
            continue;
        }
        if random.random_bool(0.1) {
            told.push(Seen::Resumed(at));
        }
        let (key, kind, change) = (key.clone(), *kind, change.clone());
        told.push(Seen::Event {
            revision: *revision,
            key,
            kind,
            change,
        });
        at = *revision;
    }
    told.push(Seen::Bookmark(last));
    told
}

/// The places of a watcher's events.
fn events(story: &[Seen]) -> Vec<usize> {
    let is_event = |(place, seen): (usize, &Seen)| matches!(seen, Seen::Event { .. }).then_some(place);
    story.iter().enumerate().filter_map(is_event).collect()
}

/// The revisions that were seen.
fn seen_at(history: &History, write: &Write) -> Option<Revision> {
    history.watchers[0].iter().find_map(|seen| match seen {
        Seen::Event {
            revision, key, change, ..
        } if (key, change) == (&write.key, &write.change) => Some(*revision),
        _ => None,
    })
}

proptest! {
    #[test]
    fn a_store_that_keeps_its_word_is_believed(seed in any::<u64>()) {
        prop_assert_eq!(check(&lawful(seed)), Vec::new());
    }

    #[test]
    fn an_event_that_one_watcher_lacks_is_missed(seed in any::<u64>(), place in any::<prop::sample::Index>()) {
        let mut history = lawful(seed);
        let events = events(&history.watchers[1]);
        let Seen::Event { revision, .. } = history.watchers[1].remove(events[place.index(events.len())]) else { unreachable!() };
        let missed = check(&history).contains(&Violation::Missed { watcher: 1, revision });
        prop_assert!(missed);
    }

    #[test]
    fn an_event_that_comes_again_is_out_of_order(seed in any::<u64>(), place in any::<prop::sample::Index>()) {
        let mut history = lawful(seed);
        let events = events(&history.watchers[0]);
        let place = events[place.index(events.len())];
        let again = history.watchers[0][place].clone();
        history.watchers[0].push(again);
        let found = check(&history);
        let told = found.iter().any(|found| matches!(found, Violation::OutOfOrder { watcher: 0, .. }));
        prop_assert!(told, "{:?}", found);
    }

    #[test]
    fn an_acknowledged_write_that_nobody_saw_is_lost(seed in any::<u64>(), choice in any::<prop::sample::Index>()) {
        let mut history = lawful(seed);
        let acknowledged: Vec<Revision> = history.writes.iter().filter_map(|write| match write.outcome {
            Outcome::Acknowledged(revision) => Some(revision),
            _ => None,
        }).collect();
        prop_assume!(!acknowledged.is_empty());
        let lost = acknowledged[choice.index(acknowledged.len())];
        for story in &mut history.watchers {
            story.retain(|seen| !matches!(seen, Seen::Event { revision, .. } if *revision == lost));
        }
        let found = check(&history);
        let told = found.iter().any(|found| matches!(found, Violation::Lost { revision, .. } if *revision == lost));
        prop_assert!(told, "{:?}", found);
    }

    #[test]
    fn a_refused_write_that_was_seen_is_a_ghost(seed in any::<u64>()) {
        let mut history = lawful(seed);
        let seen = (0..history.writes.len()).find(|place| seen_at(&history, &history.writes[*place]).is_some());
        let Some(place) = seen else { return Ok(()) };
        let is_put = matches!(history.writes[place].change, Change::Put(_));
        prop_assume!(is_put);
        history.writes[place].outcome = Outcome::Refused;
        let found = check(&history);
        let told = found.iter().any(|found| matches!(found, Violation::Ghost { .. }));
        prop_assert!(told, "{:?}", found);
    }

    #[test]
    fn an_end_that_differs_is_a_wrong_list(seed in any::<u64>()) {
        let mut history = lawful(seed);
        let Some(key) = history.end.objects.keys().next().cloned() else { return Ok(()) };
        history.end.objects.remove(&key);
        let found = check(&history);
        let told = found.iter().any(|found| matches!(found, Violation::WrongSnapshot { key: other, .. } if *other == key));
        prop_assert!(told, "{:?}", found);
    }
}

/// Acknowledged puts of a key, in order, with their revisions.
fn puts<'a>(history: &'a History, key: &str) -> Vec<(&'a Write, Revision)> {
    let own = history
        .writes
        .iter()
        .filter(|write| write.key == *key && matches!(write.change, Change::Put(_)));
    own.filter_map(|write| match write.outcome {
        Outcome::Acknowledged(revision) => Some((write, revision)),
        _ => None,
    })
    .collect()
}

fn read_at_the_end(history: &History, key: &str, found: Option<(String, Revision)>) -> Read {
    let last = history
        .writes
        .iter()
        .map(|write| write.ended)
        .chain(history.reads.iter().map(|read| read.ended));
    let begun = last.max().unwrap_or_default() + 1;
    let (key, ended) = (key.to_owned(), begun + 1);
    Read {
        key,
        begun,
        ended,
        found,
    }
}

proptest! {
    #[test]
    fn a_write_that_replaces_what_it_did_not_see_is_found(seed in any::<u64>(), choice in any::<prop::sample::Index>()) {
        let mut history = lawful(seed);
        let winners: Vec<usize> = (0..history.writes.len()).filter(|place| {
            let write = &history.writes[*place];
            write.base.is_some_and(|base| base > 0) && matches!(write.outcome, Outcome::Acknowledged(_))
        }).collect();
        prop_assume!(!winners.is_empty());
        // It wins with the base of one before it.
        let write = &mut history.writes[winners[choice.index(winners.len())]];
        let replaced = write.base.replace(0).unwrap_or_default();
        let Outcome::Acknowledged(revision) = write.outcome else { unreachable!() };
        let overwrote = Violation::Overwrote { key: CONTENDED.to_owned(), base: 0, revision, replaced };
        prop_assert_eq!(check(&history), vec![overwrote]);
    }

    #[test]
    fn a_write_that_is_refused_without_a_winner_is_found(seed in any::<u64>()) {
        let mut history = lawful(seed);
        let base = history.end.objects.get(CONTENDED).map_or(0, |(_, revision)| *revision);
        let last = history.writes.iter().map(|write| write.ended).max().unwrap_or_default();
        history.writes.push(Write {
            key: CONTENDED.to_owned(),
            change: Change::Put("late".to_owned()),
            base: Some(base),
            begun: last + 1,
            ended: last + 2,
            outcome: Outcome::Refused,
        });
        prop_assert_eq!(check(&history), vec![Violation::NoWinner { key: CONTENDED.to_owned(), base }]);
    }

    #[test]
    fn a_get_of_what_was_replaced_is_stale(seed in any::<u64>(), choice in any::<prop::sample::Index>()) {
        let mut history = lawful(seed);
        let known = puts(&history, CONTENDED);
        prop_assume!(known.len() > 1);
        let (old, returned) = known[choice.index(known.len() - 1)];
        let Change::Put(value) = old.change.clone() else { unreachable!() };
        let read = read_at_the_end(&history, CONTENDED, Some((value, returned)));
        history.reads.push(read);
        let found = check(&history);
        let told = matches!(&found[..], [Violation::StaleRead { returned: Some(old), .. }] if *old == returned);
        prop_assert!(told, "{:?}", found);
    }

    #[test]
    fn a_get_that_does_not_find_what_is_there_is_stale(seed in any::<u64>()) {
        let mut history = lawful(seed);
        prop_assume!(!puts(&history, CONTENDED).is_empty());
        let read = read_at_the_end(&history, CONTENDED, None);
        history.reads.push(read);
        let found = check(&history);
        let told = matches!(&found[..], [Violation::StaleRead { returned: None, .. }]);
        prop_assert!(told, "{:?}", found);
    }
}

/// Two writes of one key, seen by one watcher.
fn short() -> History {
    let write = |value: &str, begun, outcome| Write {
        key: "a".to_owned(),
        change: Change::Put(value.to_owned()),
        base: None,
        begun,
        ended: begun + 1,
        outcome,
    };
    let event = |revision, kind, value: &str| Seen::Event {
        revision,
        key: "a".to_owned(),
        kind,
        change: Change::Put(value.to_owned()),
    };
    History {
        writes: vec![
            write("one", 0, Outcome::Acknowledged(5)),
            write("two", 2, Outcome::Acknowledged(7)),
        ],
        reads: Vec::new(),
        watchers: vec![vec![
            Seen::Listed(Snapshot {
                revision: 3,
                objects: BTreeMap::new(),
            }),
            event(5, Kind::Added, "one"),
            event(7, Kind::Modified, "two"),
        ]],
        end: Snapshot {
            revision: 7,
            objects: BTreeMap::from([("a".to_owned(), ("two".to_owned(), 7))]),
        },
    }
}

#[test]
fn each_violation_is_told_by_its_name() {
    assert_eq!(check(&short()), Vec::new());

    let mut reordered = short();
    (reordered.writes[1].begun, reordered.writes[1].ended) = (0, 1);
    (reordered.writes[0].begun, reordered.writes[0].ended) = (2, 3);
    assert_eq!(check(&reordered), vec![Violation::Reordered { earlier: 7, later: 5 }]);

    let mut uncovered = short();
    uncovered.end.revision = 9;
    assert_eq!(check(&uncovered), vec![Violation::Uncovered { after: 7 }]);

    let mut wrong_kind = short();
    if let Seen::Event { kind, .. } = &mut wrong_kind.watchers[0][2] {
        *kind = Kind::Added;
    }
    assert!(matches!(
        check(&wrong_kind)[..],
        [Violation::WrongKind { revision: 7, .. }]
    ));

    let mut disagree = short();
    let other = disagree.watchers[0].clone();
    disagree.watchers.push(other);
    if let Seen::Event { change, .. } = &mut disagree.watchers[1][2] {
        *change = Change::Delete;
    }
    assert!(matches!(
        check(&disagree)[..],
        [Violation::Disagree { revision: 7, .. }]
    ));

    let mut twice = short();
    twice.watchers[0].push(Seen::Event {
        revision: 8,
        key: "a".to_owned(),
        kind: Kind::Modified,
        change: Change::Put("two".to_owned()),
    });
    twice.end = Snapshot {
        revision: 8,
        objects: BTreeMap::from([("a".to_owned(), ("two".to_owned(), 8))]),
    };
    assert!(matches!(
        check(&twice)[..],
        [Violation::Twice { revisions: (7, 8), .. }]
    ));

    let mut invented = short();
    let nobodys = Some(("three".to_owned(), 7));
    invented.reads.push(read_at_the_end(&invented, "a", nobodys));
    assert!(matches!(check(&invented)[..], [Violation::Ghost { revision: 7, .. }]));

    // Who reads after another's Get returned something knows that, too, though its write had no answer yet.
    let mut backwards = short();
    backwards.writes[1].outcome = Outcome::Unknown;
    backwards
        .reads
        .push(read_at_the_end(&backwards, "a", Some(("two".to_owned(), 7))));
    assert_eq!(check(&backwards), Vec::new());
    backwards
        .reads
        .push(read_at_the_end(&backwards, "a", Some(("one".to_owned(), 5))));
    let stale = Violation::StaleRead {
        key: "a".to_owned(),
        returned: Some(5),
        known: 7,
    };
    assert_eq!(check(&backwards), vec![stale]);

    let mut created = short();
    created.writes[1].base = Some(0);
    let (key, base) = ("a".to_owned(), 0);
    let overwrote = Violation::Overwrote {
        key,
        base,
        revision: 7,
        replaced: 5,
    };
    assert_eq!(check(&created), vec![overwrote], "what is there cannot be created");

    let mut removed = short();
    removed.watchers[0].push(Seen::Event {
        revision: 8,
        key: "a".to_owned(),
        kind: Kind::Deleted,
        change: Change::Delete,
    });
    removed.end = Snapshot {
        revision: 8,
        objects: BTreeMap::new(),
    };
    assert!(matches!(check(&removed)[..], [Violation::Ghost { revision: 8, .. }]));
    let unknown = Write {
        change: Change::Delete,
        outcome: Outcome::Unknown,
        ..removed.writes[1].clone()
    };
    removed.writes.push(unknown);
    assert_eq!(
        check(&removed),
        Vec::new(),
        "a removal without an answer may have happened"
    );
}
