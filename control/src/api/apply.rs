//! Apply: everything is parsed, merged, defaulted and validated before anything is written; then each object has its result.
//!
//! It is not a transaction. When the client goes away in the middle, what was not written yet is not written.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use futures::{StreamExt, stream};
use orlop_proto::{
    ResourceKind,
    api::v1::{ApplyRequest, ApplyResult, Object, apply_request::Input},
    object_kind,
};
use serde_json::Value;
use tonic::{Code, Status};

use super::{Answers, ObjectsService, audit, errors, is_path_segment};
use crate::{
    cache::{Cache, ObjectKey},
    kinds::{KindVisitor, visit_kind},
    manifest::{self, ManifestError},
    merge, model, panics,
    registry::{FieldError, Registered, Registry, RegistryError},
};

/// How often an object is merged anew when others wrote it in between.
const ATTEMPTS: usize = 8;
/// Objects that are written at the same time: the store commits them in groups.
const CONCURRENT: usize = 64;

/// An object of the input.
struct Given {
    /// The document that it stands in; 0: none.
    document: usize,
    kind: ResourceKind,
    value: Value,
}

/// An object to apply, checked.
struct Item {
    index: u32,
    kind: ResourceKind,
    key: ObjectKey,
    /// As it was given, in JSON.
    given: Value,
}

/// Applies an object or a manifest.
pub(super) async fn apply(
    service: &ObjectsService,
    by: Arc<str>,
    request: ApplyRequest,
) -> Result<Answers<ApplyResult>, Status> {
    let namespace = if request.namespace.is_empty() {
        "default".to_owned()
    } else {
        request.namespace
    };
    if !is_path_segment(&namespace) {
        return Err(errors::invalid("namespace", "must be a namespace's name"));
    }
    let input = request
        .input
        .ok_or_else(|| errors::invalid("manifest", "an object or a manifest is required"))?;
    service.catch_up().await?;
    let registry = service.registry.clone();
    let checked = tokio::task::spawn_blocking(move || {
        panics::contain(|| {
            let (given, what) = parse(input)?;
            check(&registry, given, &namespace).map_err(|fields| errors::bad_request(what, &fields))
        })
    });
    let items = checked.await.map_err(|error| Status::internal(error.to_string()))??;
    let registry = service.registry.clone();
    let results = stream::iter(in_groups(items)).flat_map(move |group| {
        let (registry, by) = (registry.clone(), Arc::clone(&by));
        let writes = group.into_iter().map(move |item| {
            let (registry, by) = (registry.clone(), Arc::clone(&by));
            async move { Ok(result(&registry, &by, item).await) }
        });
        stream::iter(writes).buffered(CONCURRENT)
    });
    Ok(results.boxed())
}

/// A namespace is written before what comes after it begins; everything else is written side by side.
fn in_groups(items: Vec<Item>) -> Vec<Vec<Item>> {
    let mut groups: Vec<Vec<Item>> = Vec::new();
    let mut alone = true;
    for item in items {
        let is_namespace = item.kind.resource == "namespaces";
        match groups.last_mut() {
            Some(group) if !alone && !is_namespace => group.push(item),
            _ => groups.push(vec![item]),
        }
        alone = is_namespace;
    }
    groups
}

/// The objects of the input, and what the input is.
fn parse(input: Input) -> Result<(Vec<Given>, &'static str), Status> {
    match input {
        Input::Object(mut object) => {
            let kind = object_kind(&object)
                .ok_or_else(|| errors::invalid("object", "is required: one of pod, service, ..."))?;
            object.set_type();
            let value = object
                .to_value()
                .map_err(|error| errors::invalid("object", &error.to_string()))?;
            let given = Given {
                document: 0,
                kind,
                value,
            };
            Ok((vec![given], "object"))
        }
        Input::Manifest(text) => {
            let objects = manifest::parse(&text, &manifest::Limits::default()).map_err(|found| {
                let fields: Vec<FieldError> = found.into_iter().map(of_manifest).collect();
                errors::bad_request("manifest", &fields)
            })?;
            let given = objects
                .into_iter()
                .map(|object| Given {
                    document: object.document,
                    kind: object.kind,
                    value: object.value,
                })
                .collect();
            Ok((given, "manifest"))
        }
    }
}

fn of_manifest(error: ManifestError) -> FieldError {
    let message = in_document(error.document, &error.message);
    // What concerns the text as a whole has no path.
    let field = if error.path.is_empty() {
        "manifest".to_owned()
    } else {
        error.path
    };
    FieldError { field, message }
}

fn in_document(document: usize, message: &str) -> String {
    if document == 0 {
        message.to_owned()
    } else {
        format!("document {document}: {message}")
    }
}

/// All objects with their keys, or all that is wrong with any of them.
fn check(registry: &Registry, given: Vec<Given>, namespace: &str) -> Result<Vec<Item>, Vec<FieldError>> {
    let several = given.len() > 1;
    let mut items = Vec::with_capacity(given.len());
    let mut wrong = Vec::new();
    let mut seen: HashMap<&'static str, HashSet<ObjectKey>> = HashMap::new();
    for (
        index,
        Given {
            document,
            kind,
            value: mut given,
        },
    ) in given.into_iter().enumerate()
    {
        let outcome = place(&kind, &mut given, namespace).and_then(|key| {
            if !seen.entry(kind.resource).or_default().insert(key.clone()) {
                return Err(vec![errors::field(
                    "metadata.name",
                    &format!("{key} is in the input twice"),
                )]);
            }
            let live = cached(registry.cache(), &kind, &key);
            build(&kind, &given, live.as_ref()).and_then(|object| valid(registry, &object, live.as_ref()))?;
            Ok(key)
        });
        match outcome {
            Ok(key) => {
                let index = u32::try_from(index).unwrap_or(u32::MAX);
                items.push(Item {
                    index,
                    kind,
                    key,
                    given,
                });
            }
            Err(fields) => {
                let name = text(&given, "name").unwrap_or_default().escape_debug().to_string();
                wrong.extend(fields.into_iter().map(|field| {
                    let message = if several {
                        format!("{} \"{name}\": {}", kind.resource, field.message)
                    } else {
                        field.message
                    };
                    FieldError {
                        field: field.field,
                        message: in_document(document, &message),
                    }
                }));
            }
        }
    }
    if wrong.is_empty() { Ok(items) } else { Err(wrong) }
}

/// Gives an object its namespace, and tells its key.
fn place(kind: &ResourceKind, given: &mut Value, namespace: &str) -> Result<ObjectKey, Vec<FieldError>> {
    let name = text(given, "name").unwrap_or_default().to_owned();
    let own = text(given, "namespace").unwrap_or_default().to_owned();
    let mut wrong = Vec::new();
    if name.is_empty() {
        wrong.push(errors::field(
            "metadata.name",
            "Required value: Apply needs to know which object",
        ));
    } else if !is_path_segment(&name) {
        wrong.push(errors::field(
            "metadata.name",
            "Invalid value: must be an object's name",
        ));
    }
    if !own.is_empty() && !kind.namespaced {
        wrong.push(errors::field(
            "metadata.namespace",
            &format!("Forbidden: {} have no namespace", kind.resource),
        ));
    }
    if !own.is_empty() && !is_path_segment(&own) {
        wrong.push(errors::field(
            "metadata.namespace",
            "Invalid value: must be a namespace's name",
        ));
    }
    if !wrong.is_empty() {
        return Err(wrong);
    }
    let namespace = match (kind.namespaced, own.as_str()) {
        (false, _) => "",
        (true, "") => namespace,
        (true, own) => own,
    };
    if kind.namespaced
        && let Some(Value::Object(meta)) = given.get_mut("metadata")
    {
        meta.insert("namespace".to_owned(), Value::String(namespace.to_owned()));
    }
    Ok(ObjectKey::new(namespace, &name))
}

fn text<'a>(given: &'a Value, field: &str) -> Option<&'a str> {
    given.get("metadata")?.get(field)?.as_str()
}

/// What the object is to become.
fn build(kind: &ResourceKind, given: &Value, live: Option<&Object>) -> Result<Object, Vec<FieldError>> {
    let live = live
        .map(Object::to_value)
        .transpose()
        .map_err(|error| vec![errors::field("", &error.to_string())])?;
    let merged = merge::apply(kind, given, live.as_ref());
    Object::from_value_as(*kind, &merged).map_err(|found| found.into_iter().map(errors::of_json).collect())
}

fn valid(registry: &Registry, object: &Object, live: Option<&Object>) -> Result<(), Vec<FieldError>> {
    let mut object = object.clone();
    model::default_object(&mut object);
    let mut found = match live {
        None => model::validate_create(&object),
        Some(live) => model::validate_update(&object, live),
    };
    found.extend(registry.check_given(&object, live));
    if found.is_empty() {
        return Ok(());
    }
    Err(found
        .into_iter()
        .map(|error| FieldError {
            field: error.field,
            message: error.message,
        })
        .collect())
}

/// The object as the cache has it.
fn cached(cache: &Cache, kind: &ResourceKind, key: &ObjectKey) -> Option<Object> {
    struct Find<'a>(&'a Cache, &'a ObjectKey);
    impl KindVisitor for Find<'_> {
        type Output = Option<Object>;
        fn visit<T: Registered>(self) -> Option<Object> {
            let found = self.0.reader::<T>().get(&self.1.namespace, &self.1.name)?;
            Some(T::clone(&found).into_object())
        }
    }
    visit_kind(kind, Find(cache, key)).flatten()
}

async fn result(registry: &Registry, by: &str, item: Item) -> ApplyResult {
    let mut answer = ApplyResult {
        index: item.index,
        resource: item.kind.resource.to_owned(),
        namespace: item.key.namespace.to_string(),
        name: item.key.name.to_string(),
        ..ApplyResult::default()
    };
    match write(registry, &item).await {
        Ok((action, object)) => {
            if action != "unchanged" {
                audit(&format!("apply ({action})"), by, &item.kind, &object);
            }
            action.clone_into(&mut answer.action);
            answer.object = Some(object);
        }
        Err(status) => {
            "failed".clone_into(&mut answer.action);
            answer.code = status.code() as i32;
            status.message().clone_into(&mut answer.message);
        }
    }
    answer
}

async fn write(registry: &Registry, item: &Item) -> Result<(&'static str, Object), Status> {
    let invalid =
        |fields: Vec<FieldError>| errors::bad_request(&format!("{} \"{}\"", item.kind.resource, item.key), &fields);
    // A resourceVersion that was given is a condition, not something to merge around.
    let is_conditional = text(&item.given, "resourceVersion").is_some_and(|version| !version.is_empty());
    for attempt in 0..ATTEMPTS {
        let live = if attempt == 0 {
            cached(registry.cache(), &item.kind, &item.key)
        } else {
            stored(registry, item).await?
        };
        let mut object = build(&item.kind, &item.given, live.as_ref()).map_err(invalid)?;
        let Some(live) = live else {
            match registry.create_object(object).await {
                Ok(created) => return Ok(("created", created)),
                Err(RegistryError::AlreadyExists { .. }) => continue,
                Err(error) => return Err(errors::of_registry(&error)),
            }
        };
        let version = live
            .meta()
            .map(|meta| meta.resource_version.clone())
            .unwrap_or_default();
        if !is_conditional && let Some(meta) = object.meta_mut() {
            meta.resource_version.clone_from(&version);
        }
        match registry.update_object(object).await {
            Ok(written) => {
                let same = written.meta().is_some_and(|meta| meta.resource_version == version);
                return Ok((if same { "unchanged" } else { "configured" }, written));
            }
            Err(RegistryError::Conflict { .. }) if !is_conditional => {}
            Err(RegistryError::NotFound { .. }) => {}
            Err(error) => return Err(errors::of_registry(&error)),
        }
    }
    Err(Status::new(
        Code::Aborted,
        format!("{} \"{}\": others kept writing it", item.kind.resource, item.key),
    ))
}

async fn stored(registry: &Registry, item: &Item) -> Result<Option<Object>, Status> {
    match registry.get_object(&item.kind, &item.key).await {
        Ok(object) => Ok(Some(object)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(errors::of_registry(&error)),
    }
}
