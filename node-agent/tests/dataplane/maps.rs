//! Pinned maps: larger ones, and what is refused in their places.

use std::{fs, io::Read as _, net::TcpStream, process::Command};

use orlop_ebpf_abi as abi;
use orlop_node::dataplane::{Config, Dataplane as _, EbpfDataplane, Sizes, kernel, layout};

use crate::{
    lifecycle::{ids, started},
    stage::{SIZES, ask, run, serve, service, vip, whole},
};

#[test]
fn larger_maps_are_a_migration() {
    run("maps::larger_maps_are_a_migration", |stage| {
        serve(1);
        let first = started(stage);
        let all: Vec<_> = (1..=30).map(|number| service(number, &[(1, 1)])).collect();
        whole(&first, &all);
        let before = ids(first.kernel());
        let mut open = TcpStream::connect(vip(1)).expect("connect");
        drop(first);
        let sizes = Sizes {
            frontends: 256,
            slots: 4096,
            sockets: 1000,
            ..SIZES
        };
        let config = Config {
            sizes,
            ..stage.config.clone()
        };
        let second = EbpfDataplane::start(config.clone()).expect("start with larger maps");
        assert_eq!(second.kernel().map(abi::ARENA).info.max_entries, 4096);
        assert_ne!(ids(second.kernel()), before);
        assert_eq!(
            open.peer_addr().expect("a peer"),
            vip(1),
            "what sockets were told came along"
        );
        ask(vip(30)).expect("an answer before the agent knows any service");
        whole(&second, &all);
        assert_eq!(second.written().frontends_written, 0, "the entries came along");
        assert_eq!(second.verify_now().expect("verify").differences, Vec::<String>::new());
        let mut byte = [0];
        open.read_exact(&mut byte).expect("the greeting");
        let grown = ids(second.kernel());
        drop(second);
        // Smaller ones are not made; the same ones are adopted.
        let third = started(stage);
        assert_eq!(ids(third.kernel()), grown);
    });
}

#[test]
fn a_pinned_map_of_another_layout_is_refused() {
    run("maps::a_pinned_map_of_another_layout_is_refused", |stage| {
        drop(started(stage));
        let pin = kernel::Pins::new(&stage.config).map(abi::FRONTENDS);
        fs::remove_file(&pin).expect("unpin");
        // The right sizes and flags, but nothing says what is in it.
        let pin = pin.to_str().expect("a path");
        let made = Command::new("bpftool")
            .args([
                "map", "create", pin, "type", "hash", "key", "8", "value", "32", "entries", "64",
            ])
            .args(["name", abi::FRONTENDS, "flags", "1"])
            .output()
            .expect("bpftool");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let Err(error) = EbpfDataplane::start(stage.config.clone()) else {
            panic!("it was opened")
        };
        let text = format!("{error}");
        assert!(
            text.contains(abi::FRONTENDS) && text.contains("not what its name says"),
            "{text}"
        );
    });
}

#[test]
fn a_hash_with_memory_of_its_own_is_the_same_hash() {
    run("maps::a_hash_with_memory_of_its_own_is_the_same_hash", |stage| {
        const NO_PREALLOC: u32 = 1;
        let dataplane = started(stage);
        let mut info = dataplane.kernel().map(abi::FRONTENDS).info.clone();
        let spec = layout::spec(abi::FRONTENDS).expect("its specification");
        assert_eq!(info.flags, 0);
        // As an earlier agent made it.
        info.flags = NO_PREALLOC;
        assert_eq!(spec.check(&info), Ok(()));
        info.flags = 1 << 7;
        assert_eq!(spec.check(&info), Err("its flags is 128, not 0".to_owned()));
    });
}

#[test]
fn what_is_another_thing_at_a_maps_place_is_refused() {
    run("maps::what_is_another_thing_at_a_maps_place_is_refused", |stage| {
        drop(started(stage));
        let pins = kernel::Pins::new(&stage.config);
        let pin = pins.map(abi::FRONTENDS);
        let kept = pins.root().join("kept");
        fs::rename(&pin, &kept).expect("rename");
        let path = pin.to_str().expect("a path");
        let array = || {
            let made = Command::new("bpftool")
                .args(["map", "create", path, "type", "array", "key", "4", "value", "32"])
                .args(["entries", "64", "name", abi::FRONTENDS])
                .output()
                .expect("bpftool");
            assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        };
        let put: [(&str, &dyn Fn()); 4] = [
            ("a map of another type", &array),
            ("another of our maps", &|| {
                fs::hard_link(pins.map(abi::ARENA), &pin).expect("link");
            }),
            ("a program's link", &|| {
                fs::hard_link(pins.link("connect4"), &pin).expect("link");
            }),
            ("a directory", &|| fs::create_dir(&pin).expect("directory")),
        ];
        for (what, put) in put {
            put();
            let Err(error) = EbpfDataplane::start(stage.config.clone()) else {
                panic!("{what} was opened")
            };
            let text = format!("{error}");
            assert!(text.contains(path), "{what}: {text}");
            fs::remove_file(&pin).or_else(|_| fs::remove_dir(&pin)).expect("unpin");
        }
        // Nothing was taken for it and nothing was made meanwhile: with the map back, all of it is adopted.
        fs::rename(&kept, &pin).expect("rename");
        started(stage).health().expect("as before");
    });
}
