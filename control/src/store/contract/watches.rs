use super::*;

contract!(
    changes_come_in_order_with_what_was_before,
    a_revision_is_never_split,
    prefixes_are_apart,
    bookmarks_follow_the_store,
    a_watch_resumes_after_any_revision,
    the_future_and_the_compacted_are_refused,
    no_gap_and_no_duplicate_under_concurrent_writers,
    a_slow_watcher_misses_nothing,
);

async fn changes_come_in_order_with_what_was_before(bench: &mut impl Bench) {
    let store = bench.store();
    let mut last = store.revision().await.unwrap();
    let mut watch = store.watch("pods/", last).await.unwrap();
    let revision = write(&store, put("pods/a", "1")).await;
    write(&store, put("pods/a", "2")).await;
    write(&store, delete("pods/a")).await;
    write(&store, delete("pods/a")).await;
    write(&store, put("pods/a", "3")).await;
    let first = next(&mut watch, &mut last).await.unwrap();
    assert_eq!(
        (first.revision, shorts(&first)),
        (revision, vec!["+pods/a=1".to_owned()])
    );
    assert_eq!(shorts(&next(&mut watch, &mut last).await.unwrap()), ["~pods/a=2<1"]);
    let gone = next(&mut watch, &mut last).await.unwrap();
    assert_eq!(
        (gone.revision, shorts(&gone)),
        (revision + 2, vec!["-pods/a<2".to_owned()])
    );
    assert_eq!(shorts(&next(&mut watch, &mut last).await.unwrap()), ["+pods/a=3"]);
}

async fn a_revision_is_never_split(bench: &mut impl Bench) {
    let store = bench.store();
    let mut last = store.revision().await.unwrap();
    let start = last;
    let many: Vec<String> = (0..120).map(|number| format!("pods/p{number:03}")).collect();
    let expected: Vec<String> = many.iter().map(|text| format!("+{text}=1")).collect();
    let mut watch = store.watch("pods/", last).await.unwrap();
    // In another order than that of the keys.
    let revision = store
        .commit(all(many.iter().rev().map(|text| put(text, "1"))))
        .await
        .unwrap();
    let set = next(&mut watch, &mut last).await.unwrap();
    assert_eq!((set.revision, shorts(&set)), (revision, expected.clone()));
    let mut resumed = store.watch("pods/", start).await.unwrap();
    last = start;
    assert_eq!(shorts(&next(&mut resumed, &mut last).await.unwrap()), expected);
}

async fn prefixes_are_apart(bench: &mut impl Bench) {
    let store = bench.store();
    let start = store.revision().await.unwrap();
    let (mut pods, mut everything) = (
        store.watch("pods/", start).await.unwrap(),
        store.watch("", start).await.unwrap(),
    );
    for text in ["pod/a", "podss/a", "services/a", "pods0"] {
        write(&store, put(text, "1")).await;
    }
    store
        .commit(all([put("pods/a", "1"), put("services/b", "1")]))
        .await
        .unwrap();
    let mut last = start;
    assert_eq!(shorts(&next(&mut pods, &mut last).await.unwrap()), ["+pods/a=1"]);
    last = start;
    let mut seen = Vec::new();
    for _ in 0..5 {
        seen.extend(shorts(&next(&mut everything, &mut last).await.unwrap()));
    }
    assert_eq!(
        seen,
        [
            "+pod/a=1",
            "+podss/a=1",
            "+services/a=1",
            "+pods0=1",
            "+pods/a=1",
            "+services/b=1"
        ]
    );
}

async fn bookmarks_follow_the_store(bench: &mut impl Bench) {
    let store = bench.store();
    let start = store.revision().await.unwrap();
    write(&store, put("services/a", "1")).await;
    let target = write(&store, put("services/b", "1")).await;
    // Nothing of this happened under the prefix: a bookmark says that the watch has come so far.
    let mut watch = store.watch("pods/", start).await.unwrap();
    let waited = tokio::time::timeout(Duration::from_secs(10), async {
        loop {
            let set = watch.next().await.unwrap().unwrap();
            assert!(set.changes.is_empty(), "{set:?}");
            if set.revision >= target {
                break;
            }
        }
    });
    waited.await.unwrap();
}

/// Reads until the given revision; (revision, first change) of every set.
async fn read_until(watch: &mut Watch, last: &mut Revision, until: Revision) -> Vec<(Revision, String)> {
    let mut seen = Vec::new();
    while *last < until {
        let set = next(watch, last).await.unwrap();
        seen.push((set.revision, shorts(&set).remove(0)));
    }
    seen
}

async fn a_watch_resumes_after_any_revision(bench: &mut impl Bench) {
    let store = bench.store();
    let start = write(&store, put("pods/a", "x")).await;
    let mut history = Vec::new();
    let mut before = "x".to_owned();
    for number in 0..40 {
        let revision = write(&store, put("pods/a", &number.to_string())).await;
        history.push((revision, format!("~pods/a={number}<{before}")));
        before = number.to_string();
    }
    for skipped in [0_usize, 1, 15, 39, 40] {
        let mut last = if skipped == 0 { start } else { history[skipped - 1].0 };
        let mut watch = store.watch("pods/", last).await.unwrap();
        // And then live.
        let value = format!("after {skipped}");
        let revision = write(&store, put("pods/a", &value)).await;
        history.push((revision, format!("~pods/a={value}<{before}")));
        before = value;
        assert_eq!(read_until(&mut watch, &mut last, revision).await, history[skipped..]);
    }
}

async fn the_future_and_the_compacted_are_refused(bench: &mut impl Bench) {
    let store = bench.store();
    let mut revisions = Vec::new();
    for number in 0..10 {
        revisions.push(write(&store, put("pods/a", &number.to_string())).await);
    }
    let current = store.revision().await.unwrap();
    let error = store.watch("pods/", current + 1).await.err().unwrap();
    assert!(
        matches!(error, StoreError::Future { requested, current: at } if requested == current + 1 && at == current),
        "{error}"
    );
    bench.compact(revisions[6]).await;
    let error = store.watch("pods/", revisions[4]).await.err().unwrap();
    let StoreError::Compacted { requested, oldest } = error else {
        panic!("{error}")
    };
    assert_eq!(requested, revisions[4]);
    assert!(oldest >= revisions[6] && oldest <= current, "{oldest} {revisions:?}");
    let mut watch = store.watch("pods/", oldest).await.unwrap();
    let mut last = oldest;
    let seen = read_until(&mut watch, &mut last, current).await;
    let expected: Vec<Revision> = revisions.into_iter().filter(|revision| *revision > oldest).collect();
    assert_eq!(
        seen.into_iter().map(|(revision, _)| revision).collect::<Vec<_>>(),
        expected
    );
}

async fn no_gap_and_no_duplicate_under_concurrent_writers(bench: &mut impl Bench) {
    let store = bench.store();
    let start = store.revision().await.unwrap();
    let mut early = store.watch("pods/", start).await.unwrap();
    let writers = (0..8).map(|writer| {
        let store = store.clone();
        tokio::spawn(async move {
            let mut written = Vec::new();
            for number in 0..50 {
                let inside = put(&format!("pods/w{writer}"), &number.to_string());
                let outside = put(&format!("services/w{writer}"), &number.to_string());
                let revision = store.commit(all([inside, outside])).await.unwrap();
                let change = match number {
                    0 => format!("+pods/w{writer}=0"),
                    _ => format!("~pods/w{writer}={number}<{}", number - 1),
                };
                written.push((revision, change));
            }
            written
        })
    });
    let writers: Vec<_> = writers.collect();
    let (mut last, mut seen, mut resumed) = (start, Vec::new(), None);
    for count in 0..400 {
        let set = next(&mut early, &mut last).await.unwrap();
        assert_eq!(set.changes.len(), 1);
        seen.push((set.revision, shorts(&set).remove(0)));
        if count == 100 {
            // While they write.
            resumed = Some((store.watch("pods/", set.revision).await.unwrap(), set.revision));
        }
    }
    let mut written = Vec::new();
    for writer in writers {
        written.extend(writer.await.unwrap());
    }
    written.sort();
    assert_eq!(seen, written);
    let (mut resumed, mut at) = resumed.unwrap();
    assert_eq!(read_until(&mut resumed, &mut at, written[399].0).await, written[101..]);
}

async fn a_slow_watcher_misses_nothing(bench: &mut impl Bench) {
    let store = bench.store();
    let start = store.revision().await.unwrap();
    let mut watch = store.watch("pods/", start).await.unwrap();
    let mut revisions = Vec::new();
    for number in 0..20 {
        let operations = (0..100).map(|key| put(&format!("pods/{key:03}"), &format!("{number:0200}")));
        revisions.push(store.commit(all(operations)).await.unwrap());
    }
    let mut last = start;
    for revision in revisions {
        let set = next(&mut watch, &mut last).await.unwrap();
        assert_eq!((set.revision, set.changes.len()), (revision, 100));
    }
}
