//! List, in pages of one revision.

use std::{ops::Bound, sync::Arc};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use bytes::Bytes;
use futures::future::BoxFuture;
use orlop_proto::{ResourceKind, api::v1::ListRequest};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tonic::Status;

use super::{
    ObjectsService, errors, kind_of,
    raw::{RawObjectList, encode},
    select::Selection,
};
use crate::{
    cache::{ObjectKey, Snapshot},
    kinds::{KindVisitor, visit_kind},
    registry::Registered,
    store::Revision,
};

/// What `continue` holds: opaque to clients, and of no worth to who changes it, since it only says where to go on.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Continue {
    /// Of the snapshot that all pages are of; 0: of one that is made for the next page, since the first is no longer kept.
    revision: Revision,
    /// Of the last object of the page before.
    namespace: String,
    name: String,
    /// Of the request's selection: another one would make a list that never was.
    selection: String,
}

impl Continue {
    /// What a client gets.
    pub fn to_text(&self) -> String {
        BASE64_URL_SAFE_NO_PAD.encode(serde_json::to_vec(self).unwrap_or_default())
    }

    /// From what a client gives; `None` when it is none of ours.
    pub fn from_text(text: &str) -> Option<Self> {
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).ok()?;
        serde_json::from_slice(&bytes).ok()
    }
}

/// Lists a kind.
pub(super) async fn list(service: &ObjectsService, request: ListRequest) -> Result<RawObjectList, Status> {
    let kind = kind_of(&request.resource)?;
    let selection = Selection::parse(
        &kind,
        &request.namespace,
        &request.label_selector,
        &request.field_selector,
    )?;
    let limit = usize::try_from(request.limit).map_err(|_| errors::invalid("limit", "must not be negative"))?;
    let fingerprint = fingerprint(&kind, &request);
    let begin = match request.r#continue.as_str() {
        "" => None,
        text => {
            let begin = Continue::from_text(text)
                .filter(|begin| begin.selection == fingerprint)
                .ok_or_else(|| {
                    errors::invalid("continue", "is not from a list with this resource and these selectors")
                })?;
            Some(begin)
        }
    };
    // A page of another replica's list may be ahead of this one's cache.
    let known = |begin: &Continue| begin.revision > 0 && begin.revision <= service.cache().revision();
    if !begin.as_ref().is_some_and(known) {
        service.catch_up().await?;
    }
    if let Some(ahead) = begin
        .as_ref()
        .filter(|begin| begin.revision > service.cache().revision())
    {
        let message = format!("continue: revision {} is in the future", ahead.revision);
        return Err(Status::failed_precondition(message));
    }
    let page = Page {
        service: service.clone(),
        selection,
        limit,
        begin,
        fingerprint,
    };
    match visit_kind(&kind, page) {
        Some(answer) => answer.await,
        None => Err(Status::internal("a kind without a cache")),
    }
}

struct Page {
    service: ObjectsService,
    selection: Selection,
    limit: usize,
    begin: Option<Continue>,
    fingerprint: String,
}

impl KindVisitor for Page {
    type Output = BoxFuture<'static, Result<RawObjectList, Status>>;

    fn visit<T: Registered>(self) -> Self::Output {
        Box::pin(async move { self.read::<T>() })
    }
}

impl Page {
    fn read<T: Registered>(self) -> Result<RawObjectList, Status> {
        let reader = self.service.cache().reader::<T>();
        let snapshot = match &self.begin {
            None | Some(Continue { revision: 0, .. }) => reader.snapshot(),
            Some(begin) => match reader.snapshot_at(begin.revision) {
                Some(snapshot) => snapshot,
                None => return Err(self.expired(begin)),
            },
        };
        let (items, last) = self.select(&snapshot);
        let mut answer = RawObjectList {
            resource_version: snapshot.revision.to_string(),
            items,
            ..RawObjectList::default()
        };
        if let Some(last) = last {
            reader.keep(&snapshot);
            let next = Continue {
                revision: snapshot.revision,
                namespace: last.namespace.to_string(),
                name: last.name.to_string(),
                selection: self.fingerprint,
            };
            answer.r#continue = next.to_text();
        }
        Ok(answer)
    }

    /// As in Kubernetes: the list can be begun anew, or gone on with at another revision by the token in the error.
    fn expired(&self, begin: &Continue) -> Status {
        let on = Continue {
            revision: 0,
            namespace: begin.namespace.clone(),
            name: begin.name.clone(),
            selection: self.fingerprint.clone(),
        };
        let message = format!(
            "the list at revision {} is no longer kept: begin anew, or go on, with what is there now, by the continue token in the \
             details",
            begin.revision
        );
        errors::expired_list(message, self.service.cache().revision(), on.to_text())
    }

    /// The page's objects, each encoded before the next one is decoded, and the last one's key when there are more.
    fn select<T: Registered>(&self, snapshot: &Snapshot<T>) -> (Vec<Bytes>, Option<ObjectKey>) {
        let namespace = self.selection.namespace();
        let start = match &self.begin {
            Some(begin) => Bound::Excluded(ObjectKey::new(&begin.namespace, &begin.name)),
            None => Bound::Included(ObjectKey::new(namespace, "")),
        };
        let mut items = Vec::new();
        let mut last = None;
        let inside = snapshot
            .objects
            .range((start, Bound::Unbounded))
            .take_while(|(key, _)| namespace.is_empty() || &*key.namespace == namespace);
        for (key, object) in inside.filter(|(_, object)| self.selection.matches(&**object)) {
            if self.limit > 0 && items.len() == self.limit {
                return (items, last);
            }
            items.push(encode(Arc::unwrap_or_clone(object)));
            last = Some(key.clone());
        }
        (items, None)
    }
}

fn fingerprint(kind: &ResourceKind, request: &ListRequest) -> String {
    let mut hash = Sha256::new();
    for part in [
        kind.resource,
        &request.namespace,
        &request.label_selector,
        &request.field_selector,
    ] {
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    }
    hex::encode(&hash.finalize()[..8])
}
