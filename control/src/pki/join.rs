//! The service `orlop.cluster.v1.Join`.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use orlop_proto::cluster::v1::{
    CreateTokenRequest, CreateTokenResponse, JoinRequest, JoinResponse, RenewRequest, RevokeTokenRequest,
    RevokeTokenResponse, join_server,
};
use tonic::{Request, Response, Status};

use super::{
    Authority, Issued, NodeKeys, PkiError, Token,
    node_keys::Claim,
    token::{TOKENS, TokenRecord, is_id},
};
use crate::{
    server::identity::{Identity, caller},
    store::{Expected, Key, Operation, Record, Store, StoreError, Transaction, Write},
};

const DEFAULT_TTL: Duration = Duration::from_secs(3600);
const MAX_TTL: Duration = Duration::from_secs(30 * 24 * 3600);
/// Times that a write is tried again when somebody else wrote in between.
const ATTEMPTS: usize = 10;

/// Makes machines nodes.
#[derive(Clone)]
pub struct JoinService {
    store: Arc<dyn Store>,
    authority: Arc<Authority>,
    keys: NodeKeys,
}

impl JoinService {
    /// With the CA that signs and the store that has tokens and keys.
    pub fn new(store: Arc<dyn Store>, authority: Arc<Authority>) -> Self {
        let keys = NodeKeys::new(Arc::clone(&store));
        Self { store, authority, keys }
    }

    /// The record of a presented token, if the token is good. The reason why not is for the log alone.
    async fn check_token(&self, text: &str) -> Result<Result<(Token, Record, TokenRecord), &'static str>, StoreError> {
        let Ok(token) = Token::parse(text) else {
            return Ok(Err("not written like a token"));
        };
        let record = match self.store.get(&token.key()).await {
            Ok(Some(record)) => record,
            Ok(None) => return Ok(Err("unknown")),
            Err(StoreError::Damaged { .. }) => return Ok(Err("damaged")),
            Err(error) => return Err(error),
        };
        let Ok(stored) = serde_json::from_slice::<TokenRecord>(&record.value) else {
            StoreError::damaged(&record.key, "no token's record");
            return Ok(Err("damaged"));
        };
        if !token.matches(&stored) {
            return Ok(Err("wrong secret"));
        }
        if stored.is_expired(SystemTime::now()) {
            return Ok(Err("expired"));
        }
        Ok(Ok((token, record, stored)))
    }

    async fn admit(&self, request: &JoinRequest) -> Result<(), Status> {
        for _ in 0..ATTEMPTS {
            let checked = self.check_token(&request.token).await.map_err(unavailable)?;
            let (token, record, stored) = checked.map_err(|reason| refuse_token(&request.node_name, reason))?;
            if !is_node_name(&request.node_name) {
                return Err(Status::invalid_argument(
                    "node_name: must be a lower case RFC 1123 subdomain of at most 63 characters in each part, 253 in all",
                ));
            }
            let key = Authority::request_key(&request.certificate_request).map_err(failed)?;
            let claim = self
                .keys
                .claim(&request.node_name, key, &token.id)
                .await
                .map_err(unavailable)?;
            let claim = match claim {
                Claim::Repeated => return Ok(()),
                Claim::Taken => {
                    tracing::warn!(
                        node = request.node_name,
                        token = token.id,
                        "join refused: the name has another key"
                    );
                    return Err(Status::already_exists(format!(
                        "node {:?} exists with another key; delete the Node object to free its name",
                        request.node_name
                    )));
                }
                Claim::Write(operation) => operation,
            };
            let expected = Expected::Revision(record.revision);
            let write = match stored.uses_left {
                Some(0) => return Err(refuse_token(&request.node_name, "used up")),
                Some(left) => Write::Put(encode(&TokenRecord {
                    uses_left: Some(left - 1),
                    ..stored
                })),
                None => Write::Check,
            };
            let operations = vec![
                Operation {
                    key: record.key,
                    expected,
                    write,
                },
                claim,
            ];
            match self.store.commit(Transaction { operations }).await {
                Ok(_) => return Ok(()),
                Err(StoreError::Conflict { .. }) => {}
                Err(error) => return Err(unavailable(error)),
            }
        }
        Err(Status::aborted(
            "too many joins with this token at the same time; try again",
        ))
    }

    fn respond(&self, issued: &Issued) -> Response<JoinResponse> {
        Response::new(JoinResponse {
            certificate: issued.certificate.to_vec().into(),
            ca_certificate: self.authority.certificate().to_vec().into(),
            not_after: Some(issued.not_after.into()),
        })
    }

    /// Removes the records of tokens whose time is over.
    async fn sweep(&self) -> Result<(), StoreError> {
        let now = SystemTime::now();
        let listing = self.store.list(&format!("{TOKENS}/")).await?;
        let expired = listing.records.into_iter().filter(|record| {
            serde_json::from_slice::<TokenRecord>(&record.value).is_ok_and(|token| token.is_expired(now))
        });
        let operations: Vec<Operation> = expired
            .take(100)
            .map(|record| Operation {
                key: record.key,
                expected: Expected::Any,
                write: Write::Delete,
            })
            .collect();
        if !operations.is_empty() {
            self.store.commit(Transaction { operations }).await?;
        }
        Ok(())
    }
}

#[async_trait]
impl join_server::Join for JoinService {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let request = request.into_inner();
        self.admit(&request).await?;
        let issued = self
            .authority
            .sign_node(&request.node_name, &request.certificate_request)
            .map_err(failed)?;
        tracing::info!(node = request.node_name, key = ?issued.key, "node joined");
        Ok(self.respond(&issued))
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<JoinResponse>, Status> {
        let Identity::Node { name, key } = caller(&request) else {
            return Err(Status::permission_denied("only a node renews its certificate"));
        };
        let request = request.into_inner();
        let issued = self
            .authority
            .sign_node(&name, &request.certificate_request)
            .map_err(failed)?;
        if !self.keys.renew(&name, key, issued.key).await.map_err(unavailable)? {
            tracing::warn!(node = %name, "renewal refused: the name has another key");
            return Err(Status::unauthenticated("the node's name has another key"));
        }
        tracing::info!(node = %name, key = ?issued.key, "node's certificate renewed");
        Ok(self.respond(&issued))
    }

    async fn create_token(
        &self,
        request: Request<CreateTokenRequest>,
    ) -> Result<Response<CreateTokenResponse>, Status> {
        let by = caller(&request).describe();
        let request = request.into_inner();
        let ttl = match request.ttl_seconds {
            0 => DEFAULT_TTL,
            seconds => u64::try_from(seconds)
                .ok()
                .map(Duration::from_secs)
                .filter(|ttl| *ttl <= MAX_TTL)
                .ok_or_else(|| Status::invalid_argument("ttl_seconds: must be between 1 second and 30 days"))?,
        };
        if let Err(error) = self.sweep().await {
            tracing::warn!(%error, "expired tokens not removed");
        }
        let token = Token::generate(&self.authority.hash());
        let expires = SystemTime::now() + ttl;
        let stored = token.record(expires, (request.uses > 0).then_some(request.uses));
        let operation = Operation {
            key: token.key(),
            expected: Expected::Absent,
            write: Write::Put(encode(&stored)),
        };
        self.store
            .commit(Transaction {
                operations: vec![operation],
            })
            .await
            .map_err(unavailable)?;
        tracing::info!(
            token = token.id,
            by,
            ttl_seconds = ttl.as_secs(),
            uses = request.uses,
            "join token created"
        );
        let expires = SystemTime::UNIX_EPOCH + Duration::from_secs(stored.expires);
        Ok(Response::new(CreateTokenResponse {
            token: token.to_string(),
            expires: Some(expires.into()),
        }))
    }

    async fn revoke_token(
        &self,
        request: Request<RevokeTokenRequest>,
    ) -> Result<Response<RevokeTokenResponse>, Status> {
        let by = caller(&request).describe();
        let id = request.into_inner().id;
        let key = Key::internal(TOKENS, &id);
        if !is_id(&id) || self.store.get(&key).await.map_err(unavailable)?.is_none() {
            return Err(Status::not_found("there is no such token"));
        }
        let operation = Operation {
            key,
            expected: Expected::Any,
            write: Write::Delete,
        };
        self.store
            .commit(Transaction {
                operations: vec![operation],
            })
            .await
            .map_err(unavailable)?;
        tracing::info!(token = id, by, "join token revoked");
        Ok(Response::new(RevokeTokenResponse {}))
    }
}

/// One answer for all that can be wrong with a token; the log knows more.
fn refuse_token(node: &str, reason: &'static str) -> Status {
    tracing::warn!(node = node.escape_debug().to_string(), reason, "join refused: token");
    Status::unauthenticated("the join token is not valid")
}

fn unavailable(error: StoreError) -> Status {
    match error {
        StoreError::Conflict { .. } => Status::aborted("somebody else wrote at the same time; try again"),
        error @ StoreError::Damaged { .. } => Status::data_loss(error.to_string()),
        error @ (StoreError::Full { .. } | StoreError::Disk { full: true, .. }) => {
            Status::resource_exhausted(error.to_string())
        }
        error => {
            tracing::error!(%error, "store failed");
            Status::unavailable("the store cannot be reached")
        }
    }
}

fn failed(error: PkiError) -> Status {
    match error {
        PkiError::Request(reason) => Status::invalid_argument(format!("certificate_request: {reason}")),
        error => {
            tracing::error!(error = &error as &dyn std::error::Error, "signing failed");
            Status::internal("the certificate could not be made")
        }
    }
}

fn encode(record: &TokenRecord) -> bytes::Bytes {
    serde_json::to_vec(record).unwrap_or_default().into()
}

/// A DNS-1123 subdomain.
fn is_node_name(name: &str) -> bool {
    let part = |part: &str| {
        let bytes = part.as_bytes();
        (1..=63).contains(&bytes.len())
            && bytes
                .iter()
                .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
            && bytes[0] != b'-'
            && bytes[bytes.len() - 1] != b'-'
    };
    name.len() <= 253 && name.split('.').all(part)
}

#[cfg(test)]
mod tests {
    use super::is_node_name;

    #[test]
    fn node_names() {
        for good in ["n1", "node-1.example", "0"] {
            assert!(is_node_name(good), "{good}");
        }
        let long = "a".repeat(64);
        let longer = ["a"; 128].join(".");
        for bad in [
            "",
            ".",
            "a..b",
            "A",
            "-a",
            "a-",
            "a/b",
            "../a",
            "a\0",
            "ä",
            long.as_str(),
            longer.as_str(),
        ] {
            assert!(!is_node_name(bad), "{bad:?}");
        }
    }
}
