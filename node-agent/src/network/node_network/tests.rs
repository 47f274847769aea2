use super::*;

fn route(address: &str, ranges: &[&str]) -> Arc<link::Route> {
    Arc::new(link::Route {
        node_name: "n".into(),
        node_address: address.into(),
        pod_cidrs: ranges.iter().map(|r| (*r).to_owned()).collect(),
    })
}

#[test]
fn routes_that_would_harm_are_refused_alone() {
    let own = parse_ranges(&["10.244.1.0/24".into()]).unwrap();
    let routes: OrdMap<String, Arc<link::Route>> = [
        ("good", route("192.0.2.2", &["10.244.2.0/24"])),
        ("mine", route("192.0.2.3", &["10.244.1.0/25"])),
        ("outside", route("192.0.2.4", &["8.8.8.0/24"])),
        ("everything", route("192.0.2.5", &["0.0.0.0/0"])),
        ("nowhere", route("none", &["10.244.3.0/24"])),
        ("other family", route("2001:db8::1", &["10.244.4.0/24"])),
    ]
    .into_iter()
    .map(|(name, route)| (name.to_owned(), route))
    .collect();
    let (wanted, errors) = wanted_routes(&own, "10.244.0.0/16", &routes);
    assert_eq!(errors.len(), 5, "{errors:?}");
    let via = Target::Via("192.0.2.2".parse().unwrap());
    let expected: BTreeMap<IpNet, Target> = [
        ("10.244.0.0/16".parse().unwrap(), Target::Unreachable),
        ("10.244.2.0/24".parse().unwrap(), via),
    ]
    .into();
    assert_eq!(wanted, expected);
}

#[test]
fn ids_that_are_no_file_names_are_refused() {
    for id in ["", "..", "../x", "a/b", "a b", "-a", "\u{e4}"] {
        assert!(check_id(id).is_err(), "{id:?}");
    }
    assert!(check_id("Ab0_.-").is_ok());
}
