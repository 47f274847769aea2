//! Which key a node's name belongs to: `nodekeys/NAME` in the store.
//!
//! A name is bound to the key that first joined with it. Another key gets the name only when the Node object is gone and
//! the binding is older than [`JOINING`], which leaves a machine that has just joined the time to make its object.
//! Control compares the key of every call from a node with the binding, so a replaced machine's certificate is worthless
//! at once. A renewal may change the key; then the one before is good until the next renewal.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use orlop_proto::{Resource, core::v1::Node};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::store::{Expected, Key, Operation, Store, StoreError, Transaction, Write};

/// So long a machine that joined may take to make its Node object before its name is free again.
const JOINING: Duration = Duration::from_secs(600);
/// Times that a write is tried again when somebody else wrote in between.
const ATTEMPTS: usize = 5;

/// SHA-256 of a public key (SubjectPublicKeyInfo, DER).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyHash([u8; 32]);

impl KeyHash {
    /// Of a key in DER.
    pub fn of(public_key: &[u8]) -> Self {
        Self(Sha256::digest(public_key).into())
    }

    fn hex(self) -> String {
        hex::encode(self.0)
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.hex())
    }
}

/// What the store keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Binding {
    /// Of the key, hex.
    key: String,
    /// The key before the last renewal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    previous: Option<String>,
    /// The token that it was made with.
    token: String,
    /// Seconds since 1970.
    since: u64,
}

impl Binding {
    fn has(&self, key: KeyHash) -> bool {
        let key = key.hex();
        self.key == key || self.previous.as_ref() == Some(&key)
    }
}

/// What a join would do to a name's binding.
#[derive(Debug)]
pub(super) enum Claim {
    /// The name is this key's already, by the same token: the join is a repetition and uses nothing up.
    Repeated,
    /// The name is free, or this key's own: write this together with the token's use.
    Write(Operation),
    /// The name is another key's.
    Taken,
}

/// The bindings of names to keys.
#[derive(Clone)]
pub struct NodeKeys {
    store: Arc<dyn Store>,
}

impl NodeKeys {
    /// In a store.
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self { store }
    }

    /// Whether a node's certificate is still the name's: no other key has taken the name since.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn is_current(&self, name: &str, key: KeyHash) -> Result<bool, StoreError> {
        // Without a binding (a store that was set up anew under the old CA) the CA's signature alone decides.
        Ok(self
            .read(name)
            .await?
            .is_none_or(|(binding, _)| binding.is_some_and(|binding| binding.has(key))))
    }

    pub(super) async fn claim(&self, name: &str, key: KeyHash, token: &str) -> Result<Claim, StoreError> {
        let found = self.read(name).await?;
        let expected = found
            .as_ref()
            .map_or(Expected::Absent, |(_, revision)| Expected::Revision(*revision));
        if let Some((binding, _)) = found {
            match binding {
                Some(binding) if binding.has(key) && binding.token == token => return Ok(Claim::Repeated),
                Some(binding) if binding.has(key) => {}
                Some(binding) => {
                    let age = now().saturating_sub(binding.since);
                    let node = Key::object(&Node::KIND, "", name);
                    if age < JOINING.as_secs() || self.store.get(&node).await?.is_some() {
                        return Ok(Claim::Taken);
                    }
                }
                None => return Ok(Claim::Taken),
            }
        }
        let binding = Binding {
            key: key.hex(),
            previous: None,
            token: token.to_owned(),
            since: now(),
        };
        Ok(Claim::Write(Operation {
            key: key_of(name),
            expected,
            write: Write::Put(encode(&binding)),
        }))
    }

    /// Binds a name to the key of a renewal. `old` is the key of the certificate that asks.
    pub(super) async fn renew(&self, name: &str, old: KeyHash, new: KeyHash) -> Result<bool, StoreError> {
        let mut last = None;
        for _ in 0..ATTEMPTS {
            let found = self.read(name).await?;
            let (token, expected) = match found {
                None => (String::new(), Expected::Absent),
                Some((Some(binding), revision)) if binding.has(old) => {
                    if binding.key == new.hex() {
                        return Ok(true);
                    }
                    (binding.token, Expected::Revision(revision))
                }
                Some(_) => return Ok(false),
            };
            let previous = (old != new).then(|| old.hex());
            let binding = Binding {
                key: new.hex(),
                previous,
                token,
                since: now(),
            };
            let write = Write::Put(encode(&binding));
            let operations = vec![Operation {
                key: key_of(name),
                expected,
                write,
            }];
            match self.store.commit(Transaction { operations }).await {
                Ok(_) => return Ok(true),
                Err(error @ StoreError::Conflict { .. }) => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        last.map_or(Ok(false), Err)
    }

    /// The binding (`None` inside when it is damaged) and its revision.
    async fn read(&self, name: &str) -> Result<Option<(Option<Binding>, u64)>, StoreError> {
        let Some(record) = self.store.get(&key_of(name)).await? else {
            return Ok(None);
        };
        let binding = serde_json::from_slice(&record.value)
            .inspect_err(|error| tracing::error!(key = %record.key, %error, "damaged record of a node's key"))
            .ok();
        Ok(Some((binding, record.revision)))
    }
}

/// Whether a stored value binds a name to this key, for who checks it from outside.
#[doc(hidden)]
pub fn is_binding_of(value: &[u8], key: KeyHash) -> bool {
    serde_json::from_slice(value).is_ok_and(|binding: Binding| binding.has(key))
}

fn key_of(name: &str) -> Key {
    Key::internal("nodekeys", name)
}

fn encode(binding: &Binding) -> Bytes {
    serde_json::to_vec(binding).unwrap_or_default().into()
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_that_other_versions_stored_are_read() {
        let key = KeyHash::of(b"a key");
        for later in ["", r#","later":{"of":[1]}"#] {
            let text = format!(
                r#"{{"key":"{}","token":"0123456789abcdef","since":7{later}}}"#,
                key.hex()
            );
            assert!(is_binding_of(text.as_bytes(), key), "{text}");
            assert!(!is_binding_of(text.as_bytes(), KeyHash::of(b"another")));
        }
    }
}
