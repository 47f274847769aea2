//! Patch: JSON merge patch (RFC 7386) and JSON patch (RFC 6902) over an object's Kubernetes JSON.
//!
//! A patch is applied to the object as the store has it, and written only if it is still that one; else it is applied anew. So a
//! patch that carries a resourceVersion (it replaces the object's, or tests it) holds for that version alone.

use json_patch::{PatchErrorKind, PatchOperation};
use orlop_proto::{
    ResourceKind,
    api::v1::{Object, PatchRequest, patch_request},
    json::{self, JsonError},
    schema::Message,
};
use serde_json::Value;
use tonic::Status;

use super::errors;
use crate::{
    cache::ObjectKey,
    registry::{FieldError, Registry, RegistryError},
};

/// How often a patch is applied anew when others wrote in between. Each time somebody else succeeded.
const ATTEMPTS: usize = 64;
/// Bytes of a patch.
const MAX_BYTES: usize = 1 << 20;
/// Levels of lists and objects in a patch, and that a JSON patch may build.
const MAX_DEPTH: usize = 64;
/// Operations of a JSON patch.
const MAX_OPERATIONS: usize = 1000;
/// What all `copy` and `move` of a JSON patch may carry: bytes of texts, and one for every value.
const MAX_CARRIED: usize = 4 << 20;
/// What is shown of a text of the caller's.
const SHOWN: usize = 100;

/// What a patch came to.
pub(super) struct Patched {
    /// As stored.
    pub object: Object,
    /// Whether it changed anything.
    pub written: bool,
    /// For the audit.
    pub verb: &'static str,
}

/// Patches an object.
pub(super) async fn patch(
    registry: &Registry,
    kind: &ResourceKind,
    key: &ObjectKey,
    request: PatchRequest,
) -> Result<Patched, Status> {
    let half = Half::of(kind, &request.subresource)?;
    let patch = Patch::parse(kind, request.patch)?;
    for _ in 0..ATTEMPTS {
        let live = registry
            .get_object(kind, key)
            .await
            .map_err(|error| errors::of_registry(&error))?;
        let object = patched(kind, key, &live, &patch)?;
        let outcome = match half {
            Half::Rest => registry.update_object(object).await,
            Half::Status => registry.update_object_status(object).await,
        };
        match outcome {
            Ok(object) => {
                let written = version(&object) != version(&live);
                let verb = half.verb();
                return Ok(Patched { object, written, verb });
            }
            // It was read a moment ago: somebody else wrote it, or deleted it, which the next look tells.
            Err(RegistryError::Conflict { .. } | RegistryError::NotFound { .. }) => {}
            Err(error) => return Err(errors::of_registry(&error)),
        }
    }
    Err(conflict(kind, key, "others kept writing it"))
}

/// What a patch makes of an object, without a store; for who checks it from outside.
///
/// # Errors
/// When the patch is refused.
#[doc(hidden)]
pub fn outcome(kind: &ResourceKind, live: &Object, patch: patch_request::Patch) -> Result<Object, Status> {
    let meta = live
        .meta()
        .ok_or_else(|| Status::internal("an object without metadata"))?;
    let key = ObjectKey::new(&meta.namespace, &meta.name);
    patched(kind, &key, live, &Patch::parse(kind, Some(patch))?)
}

/// Which half of the object a patch changes.
#[derive(Clone, Copy)]
enum Half {
    Rest,
    Status,
}

impl Half {
    fn of(kind: &ResourceKind, subresource: &str) -> Result<Self, Status> {
        match subresource {
            "" => Ok(Self::Rest),
            "status" if Message::of(kind).field("status").is_none() => {
                let message = format!("{} have no status", kind.resource);
                Err(errors::invalid("subresource", &message))
            }
            "status" => Ok(Self::Status),
            other => {
                let message = format!("\"{}\" is neither empty nor \"status\"", shown(other));
                Err(errors::invalid("subresource", &message))
            }
        }
    }

    fn verb(self) -> &'static str {
        match self {
            Self::Rest => "patch",
            Self::Status => "patch status",
        }
    }
}

/// A patch whose form is sound.
enum Patch {
    Merge(Value),
    Operations(Vec<PatchOperation>),
}

impl Patch {
    fn parse(kind: &ResourceKind, given: Option<patch_request::Patch>) -> Result<Self, Status> {
        match given {
            None => Err(errors::invalid("patch", "is required: merge or json")),
            Some(patch_request::Patch::Merge(text)) => {
                let value = read("merge", &text)?;
                // Nulls take fields away, so what is unknown would pass unseen in the result.
                let found = json::check(Message::of(kind), &value);
                if found.is_empty() {
                    Ok(Self::Merge(value))
                } else {
                    Err(wrong_fields(found))
                }
            }
            Some(patch_request::Patch::Json(text)) => operations(read("json", &text)?).map(Self::Operations),
        }
    }

    fn apply(&self, document: &mut Value) -> Result<(), Status> {
        match self {
            Self::Merge(patch) => {
                json_patch::merge(document, patch);
                Ok(())
            }
            Self::Operations(operations) => {
                let mut carried = MAX_CARRIED;
                for (index, operation) in operations.iter().enumerate() {
                    apply_one(document, index, operation, &mut carried)?;
                }
                Ok(())
            }
        }
    }
}

/// The JSON of a patch, within the limits.
fn read(field: &str, text: &str) -> Result<Value, Status> {
    if text.len() > MAX_BYTES {
        let message = format!("has {} bytes, at most {MAX_BYTES} are allowed", text.len());
        return Err(errors::invalid(field, &message));
    }
    let value = json::parse(text).map_err(|error| errors::invalid(field, &shown(&error.to_string())))?;
    if depth(&value) > MAX_DEPTH {
        return Err(errors::invalid(field, &format!("has more than {MAX_DEPTH} levels")));
    }
    Ok(value)
}

fn operations(value: Value) -> Result<Vec<PatchOperation>, Status> {
    let Value::Array(elements) = value else {
        return Err(errors::invalid("json", "must be a list of operations"));
    };
    if elements.len() > MAX_OPERATIONS {
        let message = format!(
            "has {} operations, at most {MAX_OPERATIONS} are allowed",
            elements.len()
        );
        return Err(errors::invalid("json", &message));
    }
    let mut wrong = Vec::new();
    let mut operations = Vec::with_capacity(elements.len());
    for (index, element) in elements.into_iter().enumerate() {
        match serde_json::from_value(element) {
            Ok(operation) => operations.push(operation),
            Err(error) => wrong.push(errors::field(&place(index), &shown(&error.to_string()))),
        }
    }
    if wrong.is_empty() {
        Ok(operations)
    } else {
        Err(errors::bad_request("patch", &wrong))
    }
}

fn apply_one(
    document: &mut Value,
    index: usize,
    operation: &PatchOperation,
    carried: &mut usize,
) -> Result<(), Status> {
    let refused = |message: &str| errors::invalid(&place(index), message);
    let from = match operation {
        PatchOperation::Copy(copy) => Some(&copy.from),
        PatchOperation::Move(r#move) => Some(&r#move.from),
        _ => None,
    };
    // A few bytes of `copy` can double a document again and again, and build what is too deep for any recursion.
    let moved = from.and_then(|from| document.pointer(from.as_str()));
    let below = match operation {
        PatchOperation::Add(add) => depth(&add.value),
        PatchOperation::Replace(replace) => depth(&replace.value),
        _ => match moved {
            Some(moved) if !charge(moved, carried) => {
                return Err(refused("copies and moves of this patch carry too much"));
            }
            moved => moved.map_or(0, depth),
        },
    };
    if operation.path().count() + below > MAX_DEPTH {
        return Err(refused(&format!("reaches below {MAX_DEPTH} levels")));
    }
    json_patch::patch_unsafe(document, std::slice::from_ref(operation)).map_err(|error| {
        let message = format!("at \"{}\": {}", shown(operation.path().as_str()), error.kind);
        match error.kind {
            PatchErrorKind::TestFailed => Status::failed_precondition(format!("{}: test {message}", place(index))),
            _ => refused(&message),
        }
    })
}

/// The object that the patch makes of the live one, to be written if the stored one is still that.
fn patched(kind: &ResourceKind, key: &ObjectKey, live: &Object, patch: &Patch) -> Result<Object, Status> {
    let before = live.to_value().map_err(|error| Status::internal(error.to_string()))?;
    let mut after = before.clone();
    patch.apply(&mut after)?;
    let mut wrong = changed_identity(&before, &after);
    let object = Object::from_value_as(*kind, &after);
    if let Err(found) = &object {
        wrong.extend(found.iter().cloned().map(errors::of_json));
    }
    let mut object = match object {
        Ok(object) if wrong.is_empty() => object,
        _ => return Err(errors::bad_request("patch", &wrong)),
    };
    let (Some(meta), Some(was)) = (object.meta_mut(), live.meta()) else {
        return Err(Status::internal("an object without metadata"));
    };
    for (what, given, stored) in [
        ("resourceVersion", &mut meta.resource_version, &was.resource_version),
        ("uid", &mut meta.uid, &was.uid),
    ] {
        if !given.is_empty() && given != stored {
            let message = format!("its {what} is {stored}, not {}", shown(given));
            return Err(conflict(kind, key, &message));
        }
        given.clone_from(stored);
    }
    meta.name.clone_from(&was.name);
    meta.namespace.clone_from(&was.namespace);
    Ok(object)
}

/// What says which object it is, and which a patch cannot change.
fn changed_identity(before: &Value, after: &Value) -> Vec<FieldError> {
    let places = [
        ("apiVersion", "/apiVersion"),
        ("kind", "/kind"),
        ("metadata.name", "/metadata/name"),
        ("metadata.namespace", "/metadata/namespace"),
    ];
    let changed = places.into_iter().filter(|(_, pointer)| {
        let given = after.pointer(pointer).filter(|value| !value.is_null());
        given.is_some_and(|given| Some(given) != before.pointer(pointer))
    });
    changed
        .map(|(path, _)| errors::field(path, "Invalid value: a patch cannot make another object of it"))
        .collect()
}

fn wrong_fields(found: Vec<JsonError>) -> Status {
    let fields: Vec<FieldError> = found.into_iter().map(errors::of_json).collect();
    errors::bad_request("patch", &fields)
}

fn conflict(kind: &ResourceKind, key: &ObjectKey, message: &str) -> Status {
    errors::of_registry(&RegistryError::Conflict {
        resource: kind.resource,
        name: key.to_string(),
        message: message.to_owned(),
    })
}

fn version(object: &Object) -> &str {
    object.meta().map_or("", |meta| meta.resource_version.as_str())
}

fn place(index: usize) -> String {
    format!("json[{index}]")
}

fn shown(text: &str) -> String {
    text.chars().take(SHOWN).flat_map(char::escape_debug).collect()
}

/// Levels of lists and objects; 0: neither.
fn depth(value: &Value) -> usize {
    let below = match value {
        Value::Array(elements) => elements.iter().map(depth).max(),
        Value::Object(entries) => entries.values().map(depth).max(),
        _ => return 0,
    };
    1 + below.unwrap_or_default()
}

/// Takes the size of a value from what is left; `false`: there is not so much.
fn charge(value: &Value, left: &mut usize) -> bool {
    let mut take = |size: usize| {
        *left = left.saturating_sub(size);
        *left > 0
    };
    match value {
        Value::String(text) => take(1 + text.len()),
        Value::Array(elements) => take(1) && elements.iter().all(|element| charge(element, left)),
        Value::Object(entries) => {
            take(1)
                && entries.iter().all(|(key, value)| {
                    *left = left.saturating_sub(key.len());
                    charge(value, left)
                })
        }
        _ => take(1),
    }
}

#[cfg(test)]
mod tests;
