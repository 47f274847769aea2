//! Which CA a cluster has: `clusterca/current` in the store. Replicas with different ones would each refuse the nodes that joined
//! at the others, so the second is told at its start.

use super::PkiError;
use crate::store::{Expected, Key, Operation, Store, StoreError, Transaction, Write};

fn key() -> Key {
    Key::internal("clusterca", "current")
}

/// The hash of the CA that the replicas of this store have; `None` before the first of them.
///
/// # Errors
/// When the store cannot be read.
pub async fn cluster_authority(store: &dyn Store) -> Result<Option<String>, StoreError> {
    let record = store.get(&key()).await?;
    Ok(record.map(|record| String::from_utf8_lossy(&record.value).into_owned()))
}

/// Makes the CA with this hash the cluster's, if it has none. Nothing is written when it has one: a store that takes no writes keeps
/// no replica from starting.
///
/// # Errors
/// [`PkiError::OtherAuthority`] when it has another one, or when the store cannot be reached.
pub async fn claim_authority(store: &dyn Store, hash: &str) -> Result<(), PkiError> {
    let claim = Operation {
        key: key(),
        expected: Expected::Absent,
        write: Write::Put(hash.to_owned().into()),
    };
    loop {
        match cluster_authority(store).await? {
            Some(ours) if ours == hash => return Ok(()),
            Some(theirs) => {
                return Err(PkiError::OtherAuthority {
                    ours: Some(hash.to_owned()),
                    theirs,
                });
            }
            None => {}
        }
        let operations = vec![claim.clone()];
        match store.commit(Transaction { operations }).await {
            Ok(_) => return Ok(()),
            // Another replica was first.
            Err(StoreError::Conflict { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
