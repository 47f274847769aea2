//! Every message of the object model, with generated values, from protobuf to JSON and back.

use std::{cell::RefCell, collections::BTreeSet};

use orlop_proto::{ResourceKind, api::v1::Object, json, schema};
use proptest::{prelude::*, test_runner::TestRunner};
use prost::Message as _;
use prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor, Value as Dynamic,
};
use serde_json::Value;

/// Enough randomness from one seed; proptest shrinks the seed only, the values are small anyway.
struct Source(u64);

impl Source {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 11) % bound
    }

    fn pick<'a, T>(&mut self, values: &'a [T]) -> &'a T {
        &values[usize::try_from(self.below(values.len() as u64)).expect("index")]
    }
}

const STRINGS: [&str; 8] = [
    "",
    "a",
    "web-1",
    "ü\u{1f600}",
    "\"quoted\"\\",
    "line\nbreak",
    "null",
    "1",
];
const QUANTITIES: [&str; 5] = ["500m", "1.50Gi", "0", "2e3", "-1"];
const INTEGERS: [i64; 6] = [0, 1, -1, 80, i64::MAX, i64::MIN];

struct Generator {
    source: Source,
    seen: BTreeSet<String>,
}

impl Generator {
    fn message(&mut self, descriptor: &MessageDescriptor) -> DynamicMessage {
        self.seen.insert(descriptor.full_name().to_owned());
        let form = schema::MESSAGES
            .iter()
            .find(|message| message.name == descriptor.full_name())
            .expect("form");
        let mut message = DynamicMessage::new(descriptor.clone());
        for field in descriptor.fields() {
            let known = form.field(field.json_name()).expect("field");
            let message_always = known.always && matches!(known.value, schema::Value::Message(_)) && !field.is_list();
            if !message_always && self.source.below(3) == 0 {
                continue;
            }
            let value = if field.is_map() {
                let count = self.source.below(3);
                let entry = |generator: &mut Self| {
                    let key = MapKey::String((*generator.source.pick(&STRINGS)).to_owned());
                    let text = if matches!(known.value, schema::Value::Quantity) {
                        &QUANTITIES[..]
                    } else {
                        &STRINGS[..]
                    };
                    (key, Dynamic::String((*generator.source.pick(text)).to_owned()))
                };
                Dynamic::Map((0..count).map(|_| entry(self)).collect())
            } else if field.is_list() {
                let count = self.source.below(3);
                Dynamic::List((0..count).map(|_| self.value(&field)).collect())
            } else {
                self.value(&field)
            };
            message.set_field(&field, value);
        }
        message
    }

    fn value(&mut self, field: &FieldDescriptor) -> Dynamic {
        match field.kind() {
            Kind::String => Dynamic::String((*self.source.pick(&STRINGS)).to_owned()),
            Kind::Bool => Dynamic::Bool(self.source.below(2) == 1),
            Kind::Int32 => Dynamic::I32(*self.source.pick(&[0, 1, -1, 8080, i32::MAX, i32::MIN])),
            Kind::Int64 => Dynamic::I64(*self.source.pick(&INTEGERS)),
            Kind::Message(message) => match message.full_name() {
                "google.protobuf.Timestamp" => self.time(&message, field),
                "google.protobuf.Value" => {
                    let mut value = DynamicMessage::new(message);
                    match self.source.below(2) {
                        0 => value.set_field_by_name("string_value", Dynamic::String("http".to_owned())),
                        _ => value
                            .set_field_by_name("number_value", Dynamic::F64(*self.source.pick(&[0.0, 8080.0, -1.0]))),
                    }
                    Dynamic::Message(value)
                }
                _ => Dynamic::Message(self.message(&message)),
            },
            kind => panic!("{kind:?}"),
        }
    }

    /// A time that its field can hold: whole seconds, or microseconds.
    fn time(&mut self, message: &MessageDescriptor, field: &FieldDescriptor) -> Dynamic {
        let option = message
            .parent_pool()
            .get_extension_by_name("orlop.meta.v1.micro_time")
            .expect("option");
        let micro = field.options().get_extension(&option).as_bool().unwrap_or(false);
        let mut time = DynamicMessage::new(message.clone());
        let seconds = *self
            .source
            .pick(&[0, 1_700_000_000, -1, -62_135_596_800, 253_402_207_200]);
        time.set_field_by_name("seconds", Dynamic::I64(seconds));
        if micro {
            time.set_field_by_name("nanos", Dynamic::I32(*self.source.pick(&[0, 1_000, 999_999_000])));
        }
        Dynamic::Message(time)
    }
}

fn generate(pool: &DescriptorPool, kind: ResourceKind, seed: u64) -> (Object, BTreeSet<String>) {
    let name = schema::Message::of(&kind).name;
    let descriptor = pool.get_message_by_name(name).expect("descriptor");
    let mut generator = Generator {
        source: Source(seed | 1),
        seen: BTreeSet::new(),
    };
    let message = generator.message(&descriptor);
    (
        Object::decode_as(kind, &message.encode_to_vec()).expect("message"),
        generator.seen,
    )
}

fn pool() -> DescriptorPool {
    DescriptorPool::decode(orlop_proto::FILE_DESCRIPTOR_SET).expect("descriptors")
}

fn run(cases: u32, test: impl Fn(ResourceKind, u64) -> Result<(), TestCaseError>) {
    let config = ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(cases)
    };
    let strategy = (0..ResourceKind::ALL.len(), any::<u64>());
    let result = TestRunner::new(config).run(&strategy, |(kind, seed)| test(ResourceKind::ALL[kind], seed));
    result.unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn every_message_comes_back() {
    let pool = pool();
    let seen = RefCell::new(BTreeSet::new());
    run(2_000, |kind, seed| {
        let (object, messages) = generate(&pool, kind, seed);
        seen.borrow_mut().extend(messages);
        let value = object.to_value().expect("json");
        prop_assert_eq!(json::check(schema::Message::of(&kind), &value), Vec::new());
        prop_assert_eq!(Object::from_value_as(kind, &value).expect("object"), object.clone());
        // Through text, and in bytes: equal objects have equal bytes.
        let parsed = json::parse(&value.to_string()).expect("text");
        prop_assert_eq!(&parsed, &value);
        let again = Object::from_value_as(kind, &parsed).expect("object");
        prop_assert_eq!(again.encode_inner(), object.encode_inner());
        prop_assert_eq!(
            Object::decode_as(kind, &object.encode_inner()).expect("bytes"),
            object.clone()
        );
        prop_assert_eq!(
            Object::decode(object.encode_to_vec().as_slice()).expect("bytes"),
            object
        );
        Ok(())
    });
    let all: BTreeSet<String> = schema::MESSAGES.iter().map(|message| message.name.to_owned()).collect();
    assert_eq!(
        *seen.borrow(),
        all,
        "every message of the object model is part of an object"
    );
}

/// What serde itself makes of the JSON: fields that it skipped, or its error.
fn by_serde(kind: ResourceKind, value: &Value) -> Result<Vec<String>, String> {
    let mut ignored = Vec::new();
    orlop_proto::with_kind!(kind, T => {
        let mut track = serde_path_to_error::Track::new();
        let deserializer = serde_path_to_error::Deserializer::new(value, &mut track);
        serde_ignored::deserialize::<_, _, T>(deserializer, |path| ignored.push(path.to_string()))
            .map(drop)
            .map_err(|error| format!("{}: {error}", track.path()))
    }, else panic!("{kind:?}"))?;
    Ok(ignored)
}

/// Changes one place of a JSON value.
fn mutate(source: &mut Source, value: &mut Value) {
    let deeper = source.below(6) != 0;
    match value {
        Value::Object(entries) if deeper && !entries.is_empty() => {
            let index = usize::try_from(source.below(entries.len() as u64)).expect("index");
            mutate(source, entries.values_mut().nth(index).expect("entry"));
        }
        Value::Array(elements) if deeper && !elements.is_empty() => {
            let index = usize::try_from(source.below(elements.len() as u64)).expect("index");
            mutate(source, &mut elements[index]);
        }
        Value::Object(entries) if source.below(2) == 0 => {
            entries.insert("unknown".to_owned(), Value::Null);
        }
        value => {
            let others = [
                Value::Null,
                Value::from(true),
                Value::from(7),
                Value::from(-1),
                Value::from(1.5),
                Value::from(i64::from(i32::MAX) + 1),
                Value::from(u64::MAX),
                Value::from("text"),
                Value::from("2024-01-01T00:00:00Z"),
                Value::Array(vec![Value::Null]),
                Value::Array(Vec::new()),
                serde_json::json!({}),
                serde_json::json!({"a": "b"}),
            ];
            value.clone_from(source.pick(&others));
        }
    }
}

/// [`json::check`] finds an error exactly where serde refuses or skips something; but for lists in place of messages, which
/// serde's derived code takes for their fields in order.
#[test]
fn the_check_and_serde_agree() {
    let pool = pool();
    run(4_000, |kind, seed| {
        let (object, _) = generate(&pool, kind, seed);
        let mut value = object.to_value().expect("json");
        let mut source = Source(seed.rotate_left(32) | 1);
        for _ in 0..=source.below(2) {
            mutate(&mut source, &mut value);
        }
        let found = json::check(schema::Message::of(&kind), &value);
        match by_serde(kind, &value) {
            Ok(ignored) => {
                let list = |error: &&json::JsonError| error.to_string().ends_with("expected an object, found a list");
                let lists = found.iter().filter(list).count();
                prop_assert!(
                    lists > 0 || found.len() == ignored.len(),
                    "{:?} {:?} {}",
                    found,
                    ignored,
                    value
                );
            }
            Err(error) => prop_assert!(!found.is_empty(), "{} {}", error, value),
        }
        if let Some(error) = found.first() {
            prop_assert!(Object::from_value_as(kind, &value).is_err(), "{}", error);
        }
        Ok(())
    });
}
