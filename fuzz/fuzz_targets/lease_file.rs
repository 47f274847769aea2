//! Address management: a configuration's `ipam`, then a lease file. Refused, or addresses of the ranges, each once.
#![no_main]

use std::{collections::BTreeSet, fs, path::PathBuf, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use orlop_bridge::{
    config::{Config, Ipam, object},
    ipam::{Leases, check},
};

static DIR: LazyLock<PathBuf> = LazyLock::new(|| {
    // In memory: every lease is synced.
    let dir = PathBuf::from(format!("/dev/shm/orlop-fuzz-ipam-{}", std::process::id()));
    fs::create_dir_all(&dir).expect("a directory");
    fs::write(dir.join("boot_id"), "boot").expect("a boot id");
    dir
});

fuzz_target!(|text: &str| {
    let Some((ipam, leases)) = text.split_once("\n---\n") else {
        return;
    };
    let config = format!(r#"{{"cniVersion": "1.0.0", "name": "net", "type": "orlop-bridge", "ipam": {ipam}}}"#);
    let Ok(object) = object(config.as_bytes()) else { return };
    let Ok(Config {
        ipam: Ipam::Orlop(mut ipam),
        ..
    }) = Config::parse(object, &Default::default())
    else {
        return;
    };
    ipam.data_dir.clone_from(&DIR);
    ipam.boot_id_file = DIR.join("boot_id");
    fs::write(DIR.join("net.json"), leases).expect("writes");
    let sound = check(&ipam).is_ok();
    let Ok(mut known) = Leases::open(&ipam, "net") else {
        return;
    };
    let mut given = BTreeSet::new();
    for number in 0..4 {
        let Ok(reservation) = known.reserve(&ipam, &format!("c{number}"), "eth0", &[]) else {
            break;
        };
        assert!(sound, "a lease of ranges that are refused");
        for ip in reservation.ips {
            let address = ip.address.addr();
            assert!(ip.gateway != Some(address) && given.insert(address), "{address} twice");
        }
    }
    for number in 0..4 {
        known.release(&format!("c{number}"), "eth0").expect("returns");
        assert!(known.held(&format!("c{number}"), "eth0").is_empty());
    }
});
