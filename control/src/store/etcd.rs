//! The etcd engine, for several control processes.
//!
//! Revisions are etcd's: a record's revision is its `mod_revision`. Every call is bounded in time; what is lost with a quorum is
//! [`StoreError::Unavailable`]. Reads are tried again, commits never: whether they happened is not known.
//!
//! A watch has to know when it has caught up with the past, and etcd before 3.4.25 and 3.5.8 may send a progress notification
//! ahead of events that it covers. So a watch that begins in the past writes a marker under its own prefix and waits for it to
//! come by (an etcd without room takes it later: until then it is told of changes, not that it has caught up); markers are invisible to
//! everybody else. Bookmarks are the last delivered revision.
//!
//! An etcd whose database has reached its quota takes no writes, but serves reads, watches and deletions ([`StoreError::Full`]).

mod compactor;
mod watch;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use etcd_client::{
    Channel, Client, Compare, CompareOp, ConnectOptions, Error, GetOptions, GetResponse, KvClient, Txn, TxnOp,
    TxnOpResponse,
};
use tonic::transport::Endpoint;

use super::{
    Expected, Key, Listing, MAX_OPERATIONS, Operation, Record, Revision, Store, StoreError, Transaction, Watch, Write,
    frame,
};

/// Keys in a page of a list; fewer where records are large.
const PAGE: i64 = 500;
/// How often a read is tried.
const ATTEMPTS: u32 = 3;
/// Between them.
const RETRY: Duration = Duration::from_millis(200);
/// The end of a marker's key.
const MARKER: &str = "~watch";

/// How to reach etcd.
#[derive(Debug, Clone)]
pub struct EtcdOptions {
    /// "http://127.0.0.1:2379", ... for all members, or one "unix:/path".
    pub endpoints: Vec<String>,
    /// How long one request may take.
    pub request_timeout: Duration,
    /// How often a watch that has nothing to tell gives a bookmark.
    pub bookmark_interval: Duration,
    /// Every so often etcd is told to forget what is older than this; `None`: somebody else does that.
    pub compact_interval: Option<Duration>,
    /// The largest message that is taken from etcd, which counts what it sends but does not weigh it. At least 4 MiB. A page of a list is
    /// asked for again with fewer records, a watch that is further behind is told to begin anew with a list.
    pub message_bytes: usize,
}

impl Default for EtcdOptions {
    fn default() -> Self {
        Self {
            endpoints: vec!["http://127.0.0.1:2379".to_owned()],
            request_timeout: Duration::from_secs(5),
            bookmark_interval: Duration::from_secs(2),
            compact_interval: Some(Duration::from_secs(300)),
            message_bytes: 64 << 20,
        }
    }
}

/// The store in etcd.
pub struct EtcdStore {
    shared: Arc<Shared>,
}

struct Shared {
    client: Client,
    kv: KvClient,
    options: EtcdOptions,
    refused: Mutex<Option<Refused>>,
}

/// The last write that etcd had no room for.
struct Refused {
    at: Instant,
    trouble: String,
}

/// How long a write that was refused for want of room tells of trouble: only another write tells whether there is room again.
const REFUSED_FOR: Duration = Duration::from_secs(15);

#[derive(Debug, thiserror::Error)]
#[error("no answer from etcd within {0:?}")]
struct TimedOut(Duration);

impl EtcdStore {
    /// Connects lazily: an etcd that cannot be reached yet is no error.
    ///
    /// # Errors
    /// When an endpoint is not an address.
    pub async fn connect(options: EtcdOptions) -> Result<Self, StoreError> {
        let client = client(&options)
            .await
            .map_err(|error| StoreError::Unavailable(Box::new(error)))?;
        let kv = client.kv_client().max_decoding_message_size(options.message_bytes);
        let shared = Arc::new(Shared {
            client,
            kv,
            options,
            refused: Mutex::default(),
        });
        compactor::start(&shared);
        Ok(Self { shared })
    }
}

async fn client(options: &EtcdOptions) -> Result<Client, Error> {
    let timeout = options.request_timeout;
    if let [single] = options.endpoints.as_slice()
        && single.starts_with("unix:")
    {
        let endpoint = Endpoint::from_shared(single.clone())?.connect_timeout(timeout);
        return Client::from_channel(Channel::Tonic(endpoint.connect_lazy()), Some(ConnectOptions::new())).await;
    }
    let connect = ConnectOptions::new()
        .with_connect_timeout(timeout)
        .with_keep_alive(timeout, timeout)
        .with_keep_alive_while_idle(true)
        .with_require_leader(true);
    Client::connect(&options.endpoints, Some(connect)).await
}

/// The key as etcd has it.
fn full(key: &Key) -> String {
    format!("{}{key}", frame::PREFIX)
}

/// The key without the engine's prefix; `None` for markers and for what is not text.
fn short(full: &[u8]) -> Option<Key> {
    let text = std::str::from_utf8(full).ok()?;
    let key = text.strip_prefix(frame::PREFIX)?;
    (!key.ends_with(MARKER)).then(|| Key::from_text(key))
}

/// The first key behind all keys with this prefix, which is ASCII and not empty.
fn behind(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

/// etcd's revisions are never negative.
fn revision(number: i64) -> Revision {
    Revision::try_from(number).unwrap_or_default()
}

fn number(revision: Revision) -> i64 {
    i64::try_from(revision).unwrap_or(i64::MAX)
}

fn unavailable(error: impl std::error::Error + Send + Sync + 'static) -> StoreError {
    StoreError::Unavailable(Box::new(error))
}

/// The text of an error that etcd itself gave.
fn said(error: &StoreError) -> &str {
    match error {
        StoreError::Unavailable(source) => match source.downcast_ref::<Error>() {
            Some(Error::GRpcStatus(status)) => status.message(),
            _ => "",
        },
        _ => "",
    }
}

fn is_compacted(error: &StoreError) -> bool {
    said(error).contains("required revision has been compacted")
}

/// The answer was larger than [`EtcdOptions::message_bytes`].
fn is_too_large(error: &Error) -> bool {
    let large = |status: &tonic::Status| {
        status.code() == tonic::Code::OutOfRange && status.message().contains("message length too large")
    };
    matches!(error, Error::GRpcStatus(status) if large(status))
}

/// What etcd says of its quota, or of the alarm that stands since then.
const NO_SPACE: &str = "database space exceeded";

impl Shared {
    /// Notes a write that was refused for want of room.
    fn refuse(&self, reason: &str) -> StoreError {
        let error = StoreError::Full {
            reason: reason.to_owned(),
        };
        let (at, trouble) = (Instant::now(), error.to_string());
        let before = self.refused().replace(Refused { at, trouble });
        if before.is_none() {
            tracing::error!(%error, "the store is full");
        }
        error
    }

    fn refused(&self) -> MutexGuard<'_, Option<Refused>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn bounded<T>(&self, call: impl Future<Output = Result<T, Error>>) -> Result<T, StoreError> {
        let limit = self.options.request_timeout;
        match tokio::time::timeout(limit, call).await {
            Ok(result) => result.map_err(|error| match &error {
                Error::GRpcStatus(status) if status.message().contains(NO_SPACE) => self.refuse(status.message()),
                _ => unavailable(error),
            }),
            Err(_) => Err(unavailable(TimedOut(limit))),
        }
    }

    /// A read, tried again when etcd cannot be reached, all within the time of one request.
    async fn read(&self, key: &str, options: GetOptions) -> Result<GetResponse, StoreError> {
        let attempts = async {
            let mut attempt = 1;
            loop {
                match self.kv.clone().get(key, Some(options.clone())).await {
                    Err(Error::GRpcStatus(status))
                        if attempt < ATTEMPTS && status.code() == tonic::Code::Unavailable =>
                    {
                        attempt += 1;
                        tokio::time::sleep(RETRY).await;
                    }
                    result => return result,
                }
            }
        };
        self.bounded(attempts).await
    }

    /// Checks that everything after a revision can be told. Returns etcd's revision.
    async fn probe(&self, after: Revision) -> Result<Revision, StoreError> {
        let at = GetOptions::new().with_revision(number(after.max(1))).with_count_only();
        match self.read(frame::PREFIX, at).await {
            Ok(response) => Ok(head(&response)),
            Err(error) if is_compacted(&error) => {
                let oldest = watch::compacted(self).await?;
                Err(StoreError::Compacted {
                    requested: after,
                    oldest,
                })
            }
            Err(error) if said(&error).contains("future revision") => {
                let current = self.revision().await?;
                Err(StoreError::Future {
                    requested: after,
                    current,
                })
            }
            Err(error) => Err(error),
        }
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        Ok(head(
            &self.read(frame::PREFIX, GetOptions::new().with_count_only()).await?,
        ))
    }

    /// One page from `start` on; fewer records where these are too large together. `limit` is for the next.
    async fn page(&self, start: &str, options: &GetOptions, limit: &mut i64) -> Result<GetResponse, StoreError> {
        loop {
            let result = self.read(start, options.clone().with_limit(*limit)).await;
            match &result {
                Err(StoreError::Unavailable(source))
                    if *limit > 1 && source.downcast_ref().is_some_and(is_too_large) =>
                {
                    *limit = (*limit / 4).max(1);
                }
                _ => {
                    *limit = (*limit + *limit / 4 + 1).min(PAGE);
                    return result;
                }
            }
        }
    }

    /// All pages at the revision of the first.
    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        let prefix = format!("{}{prefix}", frame::PREFIX);
        let mut start = prefix.clone();
        let mut listing = Listing {
            revision: 0,
            records: Vec::new(),
        };
        let mut limit = PAGE;
        loop {
            let mut options = GetOptions::new().with_range(behind(&prefix));
            if listing.revision > 0 {
                options = options.with_revision(number(listing.revision));
            }
            let mut page = self.page(&start, &options, &mut limit).await?;
            if listing.revision == 0 {
                listing.revision = head(&page);
            }
            let more = page.more();
            let kvs = page.take_kvs();
            if let Some(last) = kvs.last() {
                start = format!("{}\0", String::from_utf8_lossy(last.key()));
            }
            for kv in &kvs {
                let Some(key) = short(kv.key()) else { continue };
                if let Some(value) = frame::unframe_or_report(&key, kv.value())? {
                    listing.records.push(Record {
                        key,
                        value,
                        revision: revision(kv.mod_revision()),
                    });
                }
            }
            if !more {
                return Ok(listing);
            }
        }
    }

    async fn commit(&self, transaction: Transaction) -> Result<Revision, StoreError> {
        let operations = &transaction.operations;
        let conditioned: Vec<&Operation> = operations.iter().filter(|one| one.expected != Expected::Any).collect();
        let compares: Vec<Compare> = conditioned.iter().map(|one| compare(one)).collect();
        let writes: Vec<TxnOp> = operations.iter().filter_map(write).collect();
        let keys_only = GetOptions::new().with_keys_only();
        let look: Vec<TxnOp> = conditioned
            .iter()
            .map(|one| TxnOp::get(full(&one.key), Some(keys_only.clone())))
            .collect();
        debug_assert!(
            writes.len() <= MAX_OPERATIONS && look.len() <= MAX_OPERATIONS,
            "checked before"
        );
        let txn = Txn::new().when(compares).and_then(writes).or_else(look);
        let result = self.bounded(self.kv.clone().txn(txn)).await;
        let response = result.map_err(|error| match said(&error) {
            text if text.contains("too large") || text.contains("too many operations") => {
                StoreError::TooLarge(text.to_owned())
            }
            _ => error,
        })?;
        if response.succeeded() {
            // Deletions are taken by an etcd that is full, too.
            if operations.iter().any(|one| matches!(one.write, Write::Put(_))) && self.refused().take().is_some() {
                tracing::info!("etcd takes writes again");
            }
            return Ok(response.header().map_or(0, |header| revision(header.revision())));
        }
        Err(conflict(&conditioned, &response.op_responses()))
    }
}

fn head(response: &GetResponse) -> Revision {
    response.header().map_or(0, |header| revision(header.revision()))
}

fn compare(operation: &Operation) -> Compare {
    let key = full(&operation.key);
    match operation.expected {
        Expected::Revision(expected) => Compare::mod_revision(key, CompareOp::Equal, number(expected)),
        // A key that is not there has the mod_revision 0.
        Expected::Absent | Expected::Any => Compare::mod_revision(key, CompareOp::Equal, 0),
    }
}

fn write(operation: &Operation) -> Option<TxnOp> {
    match &operation.write {
        Write::Put(value) => Some(TxnOp::put(full(&operation.key), frame::frame(value), None)),
        Write::Delete => Some(TxnOp::delete(full(&operation.key), None)),
        Write::Check => None,
    }
}

/// The first condition that did not hold, from what etcd found at each key.
fn conflict(conditioned: &[&Operation], found: &[TxnOpResponse]) -> StoreError {
    let found = found.iter().map(|response| match response {
        TxnOpResponse::Get(get) => get.kvs().first().map(|kv| revision(kv.mod_revision())),
        _ => None,
    });
    for (operation, found) in conditioned.iter().zip(found) {
        let holds = match operation.expected {
            Expected::Absent => found.is_none(),
            Expected::Revision(expected) => found == Some(expected),
            Expected::Any => true,
        };
        if !holds {
            return StoreError::Conflict {
                key: operation.key.clone(),
                expected: operation.expected,
                found,
            };
        }
    }
    StoreError::Unavailable("etcd refused a transaction whose conditions hold".into())
}

#[async_trait]
impl Store for EtcdStore {
    async fn get(&self, key: &Key) -> Result<Option<Record>, StoreError> {
        let response = self.shared.read(&full(key), GetOptions::new()).await?;
        let Some(kv) = response.kvs().first() else {
            return Ok(None);
        };
        let value = frame::unframe(key, kv.value())?;
        Ok(Some(Record {
            key: key.clone(),
            value,
            revision: revision(kv.mod_revision()),
        }))
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        for _ in 1..ATTEMPTS {
            match self.shared.list(prefix).await {
                // The revision of the first page went before the last was read.
                Err(error) if is_compacted(&error) => {}
                result => return result,
            }
        }
        self.shared.list(prefix).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<Revision, StoreError> {
        transaction.check_limits()?;
        self.shared.commit(transaction).await
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
        watch::open(self.shared.clone(), prefix.to_owned(), after).await
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        self.shared.revision().await
    }

    fn trouble(&self) -> Option<String> {
        let refused = self.shared.refused();
        let lately = refused.as_ref().filter(|refused| refused.at.elapsed() < REFUSED_FOR);
        lately.map(|refused| refused.trouble.clone())
    }
}
