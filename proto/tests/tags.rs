//! Tags are for ever: what `tags.txt` says of a field's number and type holds as long as anybody has data or an older peer.
//!
//! A new field or RPC makes this test fail until it is written down: `ORLOP_UPDATE_TAGS=1 cargo test -p orlop-proto --test tags`
//! adds what is new to `tags.txt` (and only that). A field that goes needs `reserved NUMBER; reserved "NAME";` in its message;
//! its line stays.

use std::{collections::BTreeMap, fs, path::Path};

use prost_reflect::{DescriptorPool, FieldDescriptor, Kind, MessageDescriptor};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tags.txt");
const HEADER: &str = "# Every field of every message and every RPC, as they are on the wire. See tests/tags.rs.\n";

/// Name to number and type.
type Tags = BTreeMap<String, String>;

fn pool() -> DescriptorPool {
    DescriptorPool::decode(orlop_proto::FILE_DESCRIPTOR_SET).expect("descriptors")
}

fn messages(pool: &DescriptorPool) -> impl Iterator<Item = MessageDescriptor> + '_ {
    pool.all_messages()
        .filter(|message| message.package_name().starts_with("orlop.") && !message.is_map_entry())
}

fn type_name(field: &FieldDescriptor) -> String {
    let name = |kind: Kind| match kind {
        Kind::Message(message) => message.full_name().to_owned(),
        Kind::Enum(enumeration) => enumeration.full_name().to_owned(),
        kind => format!("{kind:?}").to_lowercase(),
    };
    match field.kind() {
        Kind::Message(entry) if field.is_map() => {
            let (key, value) = (entry.map_entry_key_field().kind(), entry.map_entry_value_field().kind());
            format!("map<{}, {}>", name(key), name(value))
        }
        kind if field.is_list() => format!("repeated {}", name(kind)),
        kind => name(kind),
    }
}

fn present(pool: &DescriptorPool) -> Tags {
    let mut tags = Tags::new();
    for message in messages(pool) {
        for field in message.fields() {
            let text = format!("{} {}", field.number(), type_name(&field));
            tags.insert(format!("{}.{}", message.full_name(), field.name()), text);
        }
    }
    for service in pool
        .services()
        .filter(|service| service.full_name().starts_with("orlop."))
    {
        for method in service.methods() {
            let stream = |streaming: bool| if streaming { "stream " } else { "" };
            let (input, output) = (method.input(), method.output());
            let text = format!(
                "rpc {}{} -> {}{}",
                stream(method.is_client_streaming()),
                input.full_name(),
                stream(method.is_server_streaming()),
                output.full_name()
            );
            tags.insert(method.full_name().to_owned(), text);
        }
    }
    tags
}

fn read(text: &str) -> Tags {
    text.lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
        .map(|line| line.split_once(" = ").unwrap_or_else(|| panic!("tags.txt: {line}")))
        .map(|(name, tag)| (name.to_owned(), tag.to_owned()))
        .collect()
}

/// Whether the message says that the field's number and name are not to be used again.
fn reserved(pool: &DescriptorPool, name: &str, tag: &str) -> bool {
    let Some((message, field)) = name.rsplit_once('.') else {
        return false;
    };
    let number: u32 = tag
        .split(' ')
        .next()
        .and_then(|number| number.parse().ok())
        .unwrap_or_default();
    pool.get_message_by_name(message).is_some_and(|message| {
        message.reserved_ranges().any(|range| range.contains(&number))
            && message.reserved_names().any(|one| one == field)
    })
}

/// What is broken, and what is new.
fn compare(pool: &DescriptorPool, recorded: &Tags) -> (Vec<String>, Tags) {
    let present = present(pool);
    let mut broken = Vec::new();
    for (name, tag) in recorded {
        match present.get(name) {
            Some(now) if now == tag => {}
            Some(now) => broken.push(format!("{name} was \"{tag}\" and is \"{now}\"")),
            None if reserved(pool, name, tag) => {}
            None => broken.push(format!("{name} ({tag}) is gone without being reserved")),
        }
    }
    let numbers: BTreeMap<(&str, &str), &str> = recorded
        .iter()
        .filter(|(_, tag)| !tag.starts_with("rpc "))
        .filter_map(|(name, tag)| {
            let (message, field) = name.rsplit_once('.')?;
            Some(((message, tag.split(' ').next()?), field))
        })
        .collect();
    let mut new = Tags::new();
    for (name, tag) in present.iter().filter(|(name, _)| !recorded.contains_key(*name)) {
        let (message, _) = name.rsplit_once('.').unwrap_or_default();
        let number = tag.split(' ').next().unwrap_or_default();
        match numbers.get(&(message, number)) {
            Some(old) => broken.push(format!("{name} has the number {number} that was {old}'s")),
            None => drop(new.insert(name.clone(), tag.clone())),
        }
    }
    (broken, new)
}

#[test]
fn tags_are_for_ever() {
    let pool = pool();
    let text = if Path::new(FILE).exists() {
        fs::read_to_string(FILE).expect("tags.txt")
    } else {
        String::new()
    };
    let mut recorded = read(&text);
    let (broken, new) = compare(&pool, &recorded);
    assert!(broken.is_empty(), "the wire format breaks:\n{}", broken.join("\n"));
    if std::env::var_os("ORLOP_UPDATE_TAGS").is_some() && !new.is_empty() {
        recorded.extend(new);
        let lines: Vec<String> = recorded.iter().map(|(name, tag)| format!("{name} = {tag}\n")).collect();
        fs::write(FILE, format!("{HEADER}{}", lines.concat())).expect("tags.txt");
        return;
    }
    let names: Vec<&String> = new.keys().collect();
    assert!(
        new.is_empty(),
        "not in tags.txt (ORLOP_UPDATE_TAGS=1 cargo test -p orlop-proto --test tags adds them): {names:?}"
    );
}

#[test]
fn breaking_changes_are_seen() {
    let pool = pool();
    let mut recorded = present(&pool);
    let name = "orlop.core.v1.PodSpec.node_name".to_owned();
    assert_eq!(compare(&pool, &recorded), (Vec::new(), Tags::new()));

    recorded.insert(name.clone(), "5 int32".to_owned());
    assert_eq!(
        compare(&pool, &recorded).0,
        [format!("{name} was \"5 int32\" and is \"5 string\"")]
    );
    recorded.insert(name.clone(), "50 string".to_owned());
    assert_eq!(compare(&pool, &recorded).0.len(), 1);

    recorded.remove(&name);
    assert_eq!(compare(&pool, &recorded).1.len(), 1);

    recorded.insert("orlop.core.v1.PodSpec.gone".to_owned(), "5 string".to_owned());
    assert_eq!(
        compare(&pool, &recorded).0,
        [
            "orlop.core.v1.PodSpec.gone (5 string) is gone without being reserved".to_owned(),
            format!("{name} has the number 5 that was gone's"),
        ]
    );
}
