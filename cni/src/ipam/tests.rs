use std::collections::BTreeSet;

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn ipam(dir: &Path, ranges: serde_json::Value) -> OrlopIpam {
    let boot = dir.join("boot_id");
    if !boot.exists() {
        fs::write(&boot, "first\n").unwrap();
    }
    serde_json::from_value(json!({
        "type": "orlop", "ranges": ranges, "dataDir": dir.join("leases"), "bootIdFile": boot,
    }))
    .unwrap()
}

fn take(ipam: &OrlopIpam, id: &str) -> Result<Vec<String>, Failure> {
    let reservation = Leases::open(ipam, "net")?.reserve(ipam, id, "eth0", &[])?;
    Ok(reservation.ips.iter().map(|ip| ip.address.to_string()).collect())
}

#[test]
fn addresses_rest_before_they_are_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let ipam = ipam(dir.path(), json!([[{"subnet": "10.1.0.0/29"}]]));
    assert_eq!(take(&ipam, "a").unwrap(), ["10.1.0.2/29"]);
    assert_eq!(take(&ipam, "b").unwrap(), ["10.1.0.3/29"]);
    Leases::open(&ipam, "net").unwrap().release("a", "eth0").unwrap();
    assert_eq!(take(&ipam, "c").unwrap(), ["10.1.0.4/29"]);
    for id in ["d", "e", "f"] {
        take(&ipam, id).unwrap();
    }
    let full = take(&ipam, "g").unwrap_err();
    assert_eq!(full.code, code::RANGE_FULL);
    assert!(full.msg.contains("10.1.0.1-10.1.0.6 of 10.1.0.0/29"), "{}", full.msg);
}

#[test]
fn the_same_attachment_keeps_its_address() {
    let dir = tempfile::tempdir().unwrap();
    let ipam = ipam(
        dir.path(),
        json!([[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00::/64"}]]),
    );
    let first = Leases::open(&ipam, "net")
        .unwrap()
        .reserve(&ipam, "a", "eth0", &[])
        .unwrap();
    assert!(first.fresh);
    let again = Leases::open(&ipam, "net")
        .unwrap()
        .reserve(&ipam, "a", "eth0", &[])
        .unwrap();
    assert!(!again.fresh);
    assert_eq!(first.ips, again.ips);
    assert_eq!(first.ips[1].address.to_string(), "fd00::2/64");
    assert_eq!(first.ips[1].gateway.unwrap().to_string(), "fd00::1");
}

#[test]
fn leases_of_another_boot_are_free() {
    let dir = tempfile::tempdir().unwrap();
    let ipam = ipam(dir.path(), json!([[{"subnet": "10.1.0.0/30"}]]));
    take(&ipam, "a").unwrap();
    assert_eq!(take(&ipam, "b").unwrap_err().code, code::RANGE_FULL);
    fs::write(&ipam.boot_id_file, "second\n").unwrap();
    assert_eq!(take(&ipam, "b").unwrap(), ["10.1.0.2/30"]);
    assert!(Leases::open(&ipam, "net").unwrap().held("a", "eth0").is_empty());
}

#[test]
fn requested_addresses_are_given_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let ipam = ipam(
        dir.path(),
        json!([[{"subnet": "10.1.0.0/24", "rangeStart": "10.1.0.10", "rangeEnd": "10.1.0.20"}]]),
    );
    let ask = |id: &str, ip: &str| {
        Leases::open(&ipam, "net")
            .unwrap()
            .reserve(&ipam, id, "eth0", &[ip.parse().unwrap()])
            .map(|r| r.ips)
    };
    assert_eq!(ask("a", "10.1.0.15").unwrap()[0].address.to_string(), "10.1.0.15/24");
    assert_eq!(ask("b", "10.1.0.15").unwrap_err().code, code::RANGE_FULL);
    assert_eq!(ask("b", "10.1.0.21").unwrap_err().code, code::INVALID_CONFIG);
    assert_eq!(ask("b", "10.1.0.1").unwrap_err().code, code::INVALID_CONFIG);
}

#[test]
fn ranges_that_make_no_sense_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        json!([[{"subnet": "10.1.0.0/31"}]]),
        json!([[{"subnet": "10.1.0.0/24", "rangeStart": "10.2.0.1"}]]),
        json!([[{"subnet": "10.1.0.0/24", "rangeStart": "10.1.0.9", "rangeEnd": "10.1.0.8"}]]),
        json!([[{"subnet": "10.1.0.0/24"}, {"subnet": "fd00::/64"}]]),
        json!([[{"subnet": "10.1.0.0/24"}], [{"subnet": "10.1.0.128/25"}]]),
        json!([[{"subnet": "10.1.0.0/24", "gateway": "fd00::1"}]]),
        json!([[{"subnet": "fd00::/127"}]]),
    ];
    for ranges in cases {
        let ipam = ipam(dir.path(), ranges.clone());
        assert_eq!(take(&ipam, "a").unwrap_err().code, code::INVALID_CONFIG, "{ranges}");
        assert_eq!(check(&ipam).unwrap_err().code, code::INVALID_CONFIG, "{ranges}");
    }
}

#[test]
fn what_a_killed_call_left_half_written_does_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let ipam = ipam(dir.path(), json!([[{"subnet": "10.1.0.0/24"}]]));
    take(&ipam, "a").unwrap();
    fs::write(ipam.data_dir.join("net.json.new"), "{\"format\":1,\"bo").unwrap();
    assert_eq!(take(&ipam, "b").unwrap(), ["10.1.0.3/24"]);
}

#[test]
fn an_unreadable_file_is_never_taken_for_an_empty_one() {
    let dir = tempfile::tempdir().unwrap();
    let ipam = ipam(dir.path(), json!([[{"subnet": "10.1.0.0/24"}]]));
    take(&ipam, "a").unwrap();
    for content in [
        "",
        "{}",
        "garbage",
        "{\"format\":2,\"bootId\":\"first\",\"last\":{},\"leases\":{}}",
    ] {
        fs::write(ipam.data_dir.join("net.json"), content).unwrap();
        assert_eq!(take(&ipam, "b").unwrap_err().code, code::IO, "{content:?}");
    }
}

/// As the first version wrote it: who changes what is in it gives it another format, and goes on reading this one.
const FIRST: &str = "{\"format\":1,\"bootId\":\"first\",\"last\":{\"10.1.0.0/24\":\"10.1.0.3\"},\"leases\":{\
    \"10.1.0.2\":{\"containerId\":\"a\",\"ifname\":\"eth0\"},\"10.1.0.3\":{\"containerId\":\"b\",\"ifname\":\"eth0\"}}}";

fn leases_of_another_version(dir: &Path, text: &str) -> OrlopIpam {
    let ipam = ipam(dir, json!([[{"subnet": "10.1.0.0/24"}]]));
    fs::create_dir_all(&ipam.data_dir).unwrap();
    fs::write(ipam.data_dir.join("net.json"), text).unwrap();
    ipam
}

#[test]
fn leases_of_the_first_version_are_held_and_written_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let ipam = leases_of_another_version(dir.path(), FIRST);
    assert_eq!(take(&ipam, "a").unwrap(), ["10.1.0.2/24"]);
    assert_eq!(take(&ipam, "b").unwrap(), ["10.1.0.3/24"]);
    assert_eq!(
        take(&ipam, "c").unwrap(),
        ["10.1.0.4/24"],
        "the search goes on behind the last"
    );
    let other = tempfile::tempdir().unwrap();
    let ipam = self::ipam(other.path(), json!([[{"subnet": "10.1.0.0/24"}]]));
    take(&ipam, "a").unwrap();
    take(&ipam, "b").unwrap();
    let written = fs::read_to_string(ipam.data_dir.join("net.json")).unwrap();
    assert_eq!(written, FIRST, "written in another way: it needs another format");
}

#[test]
fn fields_of_a_newer_version_are_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let text = FIRST.replace("\"ifname\":", "\"later\":{\"of\":[1]},\"ifname\":");
    let ipam = leases_of_another_version(
        dir.path(),
        &text.replace("{\"format\":1,", "{\"format\":1,\"later\":null,"),
    );
    assert_eq!(take(&ipam, "a").unwrap(), ["10.1.0.2/24"]);
    assert_eq!(take(&ipam, "c").unwrap(), ["10.1.0.4/24"]);
}

#[test]
fn a_format_of_a_newer_version_is_refused_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let text = "{\"format\":2,\"leases\":[[\"10.1.0.2\",\"a\"]]}";
    let ipam = leases_of_another_version(dir.path(), text);
    let path = ipam.data_dir.join("net.json");
    let refused = take(&ipam, "b").unwrap_err();
    assert_eq!(refused.code, code::IO);
    for what in [
        &*path.display().to_string(),
        "format 2",
        "the newer one reads it",
        "remove it when no pod",
    ] {
        assert!(refused.to_string().contains(what), "{refused}");
    }
    assert!(Leases::open(&ipam, "net").is_err(), "nothing is returned to it, either");
    assert_eq!(fs::read_to_string(&path).unwrap(), text);
}

#[test]
fn a_vast_subnet_takes_no_time() {
    let dir = tempfile::tempdir().unwrap();
    let ranges = json!([[{"subnet": "fd00::/8", "rangeStart": "fd00::ffff:0:0:0"}, {"subnet": "fc00::/16"}]]);
    let ipam = ipam(dir.path(), ranges);
    assert_eq!(take(&ipam, "a").unwrap(), ["fd00::ffff:0:0:0/8"]);
    assert_eq!(take(&ipam, "b").unwrap(), ["fd00::ffff:0:0:1/8"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Whatever is taken and returned in whatever order: no address twice, none outside, and full means full.
    #[test]
    fn no_address_is_given_twice(steps in proptest::collection::vec((any::<bool>(), 0_u8..24), 1..80)) {
        let dir = tempfile::tempdir().unwrap();
        let ipam = ipam(dir.path(), json!([[
            {"subnet": "10.1.0.0/29"},
            {"subnet": "10.2.0.0/24", "rangeStart": "10.2.0.7", "rangeEnd": "10.2.0.12", "gateway": "10.2.0.9"},
        ]]));
        let capacity = 5 + 5;
        let mut held: BTreeMap<u8, String> = BTreeMap::new();
        for (add, id) in steps {
            if add {
                match take(&ipam, &format!("c{id}")) {
                    Ok(ips) => { held.insert(id, ips[0].clone()); }
                    Err(failure) => {
                        prop_assert_eq!(failure.code, code::RANGE_FULL);
                        prop_assert_eq!(held.len(), capacity);
                    }
                }
            } else {
                Leases::open(&ipam, "net").unwrap().release(&format!("c{id}"), "eth0").unwrap();
                held.remove(&id);
            }
            let distinct: BTreeSet<&String> = held.values().collect();
            prop_assert_eq!(distinct.len(), held.len());
            prop_assert!(!distinct.iter().any(|ip| ip.starts_with("10.1.0.1/") || ip.starts_with("10.2.0.9/")));
        }
    }
}
