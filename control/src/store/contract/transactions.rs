use super::*;

contract!(
    conditions_hold_or_nothing_is_written,
    transactions_are_atomic,
    the_conflict_names_the_first_key,
    what_changes_nothing_has_no_revision,
    revisions_grow_by_one_write,
    limits,
    lists_are_of_one_revision_and_one_prefix,
    what_was_acknowledged_survives_a_restart,
    damaged_values_are_put_aside,
    values_of_a_newer_version_are_refused,
    counters_under_concurrent_writers,
);

async fn conditions_hold_or_nothing_is_written(bench: &mut impl Bench) {
    let store = bench.store();
    let first = write(&store, if_(put("pods/a", "1"), Expected::Absent)).await;
    let error = store
        .commit(all([if_(put("pods/a", "2"), Expected::Absent)]))
        .await
        .unwrap_err();
    assert!(
        matches!(error, StoreError::Conflict { found: Some(found), .. } if found == first),
        "{error}"
    );
    let second = write(&store, if_(put("pods/a", "2"), Expected::Revision(first))).await;
    assert!(second > first);
    let error = store
        .commit(all([if_(put("pods/a", "3"), Expected::Revision(first))]))
        .await
        .unwrap_err();
    assert!(
        matches!(error, StoreError::Conflict { found: Some(found), .. } if found == second),
        "{error}"
    );
    let error = store
        .commit(all([if_(put("pods/b", "3"), Expected::Revision(first))]))
        .await
        .unwrap_err();
    assert!(matches!(error, StoreError::Conflict { found: None, .. }), "{error}");
    let error = store
        .commit(all([if_(delete("pods/a"), Expected::Revision(first))]))
        .await
        .unwrap_err();
    assert!(matches!(error, StoreError::Conflict { .. }), "{error}");
    assert_eq!(value(&store, "pods/a").await, Some(("2".to_owned(), second)));
    let third = write(&store, put("pods/a", "3")).await;
    assert_eq!(value(&store, "pods/a").await, Some(("3".to_owned(), third)));
    let fourth = write(&store, if_(delete("pods/a"), Expected::Revision(third))).await;
    assert_eq!(value(&store, "pods/a").await, None);
    assert_eq!(store.revision().await.unwrap(), fourth);
}

async fn transactions_are_atomic(bench: &mut impl Bench) {
    let store = bench.store();
    let first = write(&store, put("pods/a", "1")).await;
    let ops = [
        put("pods/b", "1"),
        if_(put("pods/a", "2"), Expected::Revision(first + 7)),
        delete("pods/a"),
    ];
    let failing = all(ops.into_iter().take(2));
    assert!(matches!(store.commit(failing).await, Err(StoreError::Conflict { .. })));
    assert_eq!(value(&store, "pods/b").await, None);
    assert_eq!(store.revision().await.unwrap(), first);

    let check = Operation {
        key: key("pods/a"),
        expected: Expected::Revision(first),
        write: Write::Check,
    };
    let both = store
        .commit(all([put("pods/b", "1"), put("services/c", "1"), check]))
        .await
        .unwrap();
    for text in ["pods/b", "services/c"] {
        assert_eq!(value(&store, text).await, Some(("1".to_owned(), both)));
    }
    assert_eq!(
        value(&store, "pods/a").await,
        Some(("1".to_owned(), first)),
        "a check writes nothing"
    );
    let check = Operation {
        key: key("pods/a"),
        expected: Expected::Absent,
        write: Write::Check,
    };
    assert!(store.commit(all([put("pods/b", "2"), check])).await.is_err());
}

async fn the_conflict_names_the_first_key(bench: &mut impl Bench) {
    let store = bench.store();
    let revision = write(&store, put("pods/z", "1")).await;
    let operations = [
        if_(put("pods/x", "1"), Expected::Absent),
        if_(put("pods/z", "1"), Expected::Absent),
        if_(put("pods/a", "1"), Expected::Revision(3)),
    ];
    let error = store.commit(all(operations)).await.unwrap_err();
    let StoreError::Conflict {
        key: named,
        expected,
        found,
    } = error
    else {
        panic!("{error}")
    };
    assert_eq!(
        (named, expected, found),
        (key("pods/z"), Expected::Absent, Some(revision))
    );
}

async fn what_changes_nothing_has_no_revision(bench: &mut impl Bench) {
    let store = bench.store();
    let revision = write(&store, put("pods/a", "1")).await;
    assert_eq!(write(&store, delete("pods/none")).await, revision);
    let check = Operation {
        key: key("pods/a"),
        expected: Expected::Revision(revision),
        write: Write::Check,
    };
    assert_eq!(write(&store, check).await, revision);
    assert_eq!(store.commit(Transaction::default()).await.unwrap(), revision);
    assert_eq!(store.revision().await.unwrap(), revision);
    // The same value again is a write.
    assert!(write(&store, put("pods/a", "1")).await > revision);
}

async fn revisions_grow_by_one_write(bench: &mut impl Bench) {
    let store = bench.store();
    let mut last = store.revision().await.unwrap();
    for number in 0..10 {
        let revision = write(&store, put(&format!("pods/{number}"), "1")).await;
        assert_eq!(revision, last + 1);
        last = revision;
    }
}

async fn limits(bench: &mut impl Bench) {
    let store = bench.store();
    let many = |count: usize| all((0..count).map(|number| if_(put(&format!("pods/{number}"), "1"), Expected::Absent)));
    let before = store.revision().await.unwrap();
    assert!(matches!(store.commit(many(129)).await, Err(StoreError::TooLarge(_))));
    let twice = all([put("pods/a", "1"), delete("pods/a")]);
    assert!(matches!(store.commit(twice).await, Err(StoreError::TooLarge(_))));
    let big = "x".repeat(MAX_TRANSACTION_BYTES + 1);
    assert!(matches!(
        store.commit(all([put("pods/a", &big)])).await,
        Err(StoreError::TooLarge(_))
    ));
    assert_eq!(store.revision().await.unwrap(), before);
    assert_eq!(store.commit(many(128)).await.unwrap(), before + 1);
    // A conflict among as many as possible is told as well.
    assert!(matches!(
        store.commit(many(128)).await,
        Err(StoreError::Conflict { .. })
    ));
    let big = "x".repeat(MAX_TRANSACTION_BYTES - 100);
    let revision = write(&store, put("pods/big", &big)).await;
    assert_eq!(value(&store, "pods/big").await, Some((big, revision)));
}

async fn lists_are_of_one_revision_and_one_prefix(bench: &mut impl Bench) {
    let store = bench.store();
    // More than a page of etcd's.
    let keys: Vec<String> = (0..1300).map(|number| format!("pods/default/p{number:04}")).collect();
    for chunk in keys.chunks(100) {
        store
            .commit(all(chunk.iter().map(|text| put(text, text))))
            .await
            .unwrap();
    }
    for other in ["podss/x", "pod/x", "services/default/a", "pods0", "zz/x"] {
        write(&store, put(other, "1")).await;
    }
    let listing = store.list("pods/").await.unwrap();
    assert_eq!(listing.revision, store.revision().await.unwrap());
    let listed: Vec<&str> = listing.records.iter().map(|record| record.key.as_str()).collect();
    assert_eq!(listed, keys);
    for record in &listing.records {
        assert_eq!(&record.value[..], record.key.as_str().as_bytes());
        assert!(record.revision > 0 && record.revision <= listing.revision);
    }
    assert_eq!(store.list("").await.unwrap().records.len(), keys.len() + 5);
    assert!(store.list("none/").await.unwrap().records.is_empty());
}

async fn what_was_acknowledged_survives_a_restart(bench: &mut impl Bench) {
    let mut revisions = Vec::new();
    {
        let store = bench.store();
        for number in 0..20 {
            revisions.push(write(&store, put(&format!("pods/{number}"), &number.to_string())).await);
        }
        write(&store, delete("pods/7")).await;
    }
    bench.restart().await;
    let store = bench.store();
    for (number, revision) in revisions.iter().enumerate() {
        let expected = (number != 7).then(|| (number.to_string(), *revision));
        assert_eq!(value(&store, &format!("pods/{number}")).await, expected);
    }
    let after = write(&store, put("pods/new", "1")).await;
    assert_eq!(after, revisions[19] + 2, "revisions go on");
    let mut watch = store.watch("pods/", revisions[18]).await.unwrap();
    let mut last = revisions[18];
    assert_eq!(shorts(&next(&mut watch, &mut last).await.unwrap()), ["+pods/19=19"]);
    assert_eq!(shorts(&next(&mut watch, &mut last).await.unwrap()), ["-pods/7<7"]);
    assert_eq!(shorts(&next(&mut watch, &mut last).await.unwrap()), ["+pods/new=1"]);
}

async fn damaged_values_are_put_aside(bench: &mut impl Bench) {
    let store = bench.store();
    write(&store, put("pods/a", "1")).await;
    write(&store, put("pods/c", "1")).await;
    bench.write_raw(&key("pods/b"), b"garbage").await;
    bench.write_raw(&key("pods/d"), b"").await;
    let error = store.get(&key("pods/b")).await.unwrap_err();
    assert!(
        matches!(&error, StoreError::Damaged { key: at, .. } if *at == key("pods/b")),
        "{error}"
    );
    let listing = store.list("pods/").await.unwrap();
    let listed: Vec<&str> = listing.records.iter().map(|record| record.key.as_str()).collect();
    assert_eq!(listed, ["pods/a", "pods/c"]);
    // It is there nevertheless, and can be removed or replaced.
    let error = store
        .commit(all([if_(put("pods/b", "2"), Expected::Absent)]))
        .await
        .unwrap_err();
    assert!(matches!(error, StoreError::Conflict { found: Some(_), .. }), "{error}");
    let before = store.revision().await.unwrap();
    write(&store, put("pods/b", "2")).await;
    write(&store, delete("pods/d")).await;
    write(&store, delete("pods/b")).await;
    let mut watch = store.watch("pods/", before).await.unwrap();
    let mut last = before;
    assert_eq!(shorts(&next(&mut watch, &mut last).await.unwrap()), ["+pods/b=2"]);
    assert_eq!(shorts(&next(&mut watch, &mut last).await.unwrap()), ["-pods/b<2"]);
}

async fn values_of_a_newer_version_are_refused(bench: &mut impl Bench) {
    let store = bench.store();
    let mut last = write(&store, put("pods/a", "1")).await;
    let before = last;
    bench.write_raw(&key("pods/b"), b"orlp\x02whatever comes then").await;
    let refused = |error: StoreError| {
        let names = matches!(&error, StoreError::Newer { key: at, format: 2, known: 1 } if *at == key("pods/b"));
        assert!(names, "{error}");
    };
    refused(store.get(&key("pods/b")).await.unwrap_err());
    // Without it the list would say that there is none, and so would a watch.
    refused(store.list("pods/").await.unwrap_err());
    refused(store.list("").await.unwrap_err());
    match store.watch("pods/", before).await {
        Ok(mut watch) => refused(next(&mut watch, &mut last).await.unwrap_err()),
        Err(error) => refused(error),
    }
    assert_eq!(value(&store, "pods/a").await, Some(("1".to_owned(), before)));
}

async fn counters_under_concurrent_writers(bench: &mut impl Bench) {
    let store = bench.store();
    write(&store, put("counters/a", "0")).await;
    let writers = (0..4).map(|_| {
        let store = store.clone();
        tokio::spawn(async move {
            let mut done = 0;
            while done < 25 {
                let (count, revision) = value(&store, "counters/a").await.unwrap();
                let more = (count.parse::<u64>().unwrap() + 1).to_string();
                match store
                    .commit(all([if_(put("counters/a", &more), Expected::Revision(revision))]))
                    .await
                {
                    Ok(_) => done += 1,
                    Err(StoreError::Conflict { .. }) => {}
                    Err(other) => panic!("{other}"),
                }
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    assert_eq!(value(&store, "counters/a").await.unwrap().0, "100");
}
