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
    for number in 0..random.random_range(20..60) {
        let key = format!("key{}", random.random_range(0..4));
        let removes = random.random_bool(0.25) && objects.contains_key(&key);
        let change = if removes {
            Change::Delete
        } else {
            Change::Put(format!("value{number}"))
        };
        let begun = clock;
        clock += 2;
        // Other parts of the store are written too.
        revision += random.random_range(1..3);
        let happens = random.random_bool(0.85);
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
            begun,
            ended,
            outcome,
        });
    }
    history.end = Snapshot { revision, objects };
    for watcher in 0..3 {
        history
            .watchers
            .push(story(&mut random, first, revision, &log, watcher == 2));
    }
    history
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

/// Two writes of one key, seen by one watcher.
fn short() -> History {
    let write = |value: &str, begun, outcome| Write {
        key: "a".to_owned(),
        change: Change::Put(value.to_owned()),
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
