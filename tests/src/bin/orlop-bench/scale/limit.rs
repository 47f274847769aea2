//! What bounds `store` from above: the same calls of the same clients to a server that does nothing with them, and the store
//! without any calls.

use std::{ffi::OsStr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail};
use clap::Parser;
use futures::stream::BoxStream;
use orlop_control::{
    config::{Limits, PkiConfig},
    pki::{Authority, NodeKeys},
    server::{Front, Listener, Readiness, Server, ServerTls, Trust},
    store::{
        Expected, Key, Store, Transaction, Write,
        embedded::{EmbeddedConfig, EmbeddedStore},
        memory::MemoryStore,
    },
};
use orlop_proto::{
    Resource,
    api::v1::{
        ApplyRequest, ApplyResult, CreateRequest, DeleteRequest, GetRequest, ListRequest, Object, ObjectList,
        PatchRequest, UpdateRequest, WatchEvent, WatchRequest,
        objects_client::ObjectsClient,
        objects_server::{Objects, ObjectsServer},
    },
    coordination::v1::Lease,
};
use prost::Message;
use tokio::{net::TcpListener, time::Instant};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, service::Routes};

use super::{
    isolation::Place,
    load::{self, Load, Until},
    ours::{self, admin},
    process::Process,
};

/// How the server that does nothing is called.
pub const NAME: &str = "rpc-alone";
const PORT: u16 = 7444;
const START: Duration = Duration::from_secs(30);

#[derive(Debug, Parser)]
#[command(name = NAME)]
struct ServerOptions {
    /// Where its certificates are.
    #[arg(long)]
    folder: PathBuf,
}

/// Control's own front (TLS, HTTP/2, who may call what) before a service that gives back what it is given.
pub async fn serve(words: Vec<String>) -> Result<()> {
    let options = ServerOptions::try_parse_from(words)?;
    let authority = Arc::new(Authority::open(&options.folder, &PkiConfig::default())?);
    authority.admin()?;
    let tls = ServerTls::new(authority, &["127.0.0.1".to_owned()])?;
    let keys = NodeKeys::new(Arc::new(MemoryStore::default()));
    let limits = Limits::default();
    let routes = Routes::new(ObjectsServer::new(Nothing));
    let (applies, apply_timeout) = (limits.concurrent_applies, limits.apply_timeout);
    let front = Front::new(routes, keys, Readiness::default(), Vec::new(), applies, apply_timeout);
    let listener = TcpListener::bind(("127.0.0.1", PORT)).await?;
    let listeners = vec![Listener::Tcp(listener, Trust::Tls)];
    Server::new(front, tls, limits)
        .serve(listeners, CancellationToken::new())
        .await?;
    Ok(())
}

/// Calls a second of the clients of `store` when the server does nothing but take the call in and answer it.
pub async fn calls(place: &Place, until: Until, writers: usize, connections: usize, lease: &Lease) -> Result<Load> {
    let folder = place.folder(NAME)?;
    let arguments: [&OsStr; 3] = [NAME.as_ref(), "--folder".as_ref(), folder.as_os_str()];
    let mut process = Process::start(&std::env::current_exe()?, &folder, &arguments)?;
    let end = Instant::now() + START;
    let tls = loop {
        process.check()?;
        if let Ok(tls) = admin(&folder)
            && let Ok(client) = ours::busy_client(PORT, &tls).await
            && call(client, lease.clone()).await.is_ok()
        {
            break tls;
        }
        if Instant::now() > end {
            bail!("{NAME} does not answer within {} s", START.as_secs());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let mut clients = Vec::new();
    for _ in 0..connections {
        clients.push(ours::busy_client(PORT, &tls).await?);
    }
    let template = lease.clone();
    let load = load::run(until, writers, move |index| {
        let client = clients[index % clients.len()].clone();
        let mut lease = template.clone();
        lease.meta_mut().name = format!("bench-{index}");
        call(client, lease)
    })
    .await?;
    process.stop();
    Ok(load)
}

async fn call(mut client: ObjectsClient<tonic::transport::Channel>, lease: Lease) -> Result<()> {
    let object = Some(lease.into_object());
    Ok(client.create(CreateRequest { object }).await.map(drop)?)
}

/// Durable writes a second into the embedded engine from tasks of this process: the transactions that control makes of the
/// calls, without the calls.
pub async fn store_alone(place: &Place, until: Until, writers: usize, lease: &Lease) -> Result<Load> {
    let path = place.folder("store-alone")?.join("store.redb");
    let opened = tokio::task::spawn_blocking(move || EmbeddedStore::open(&path, EmbeddedConfig::default()));
    let store = Arc::new(opened.await?.context("opening a store")?);
    let namespace = Key::from_text("namespaces/default");
    let revision = store
        .commit(Transaction::one(
            namespace.clone(),
            Expected::Absent,
            Write::Put("default".into()),
        ))
        .await?;
    let put = Write::Put(lease.encode_to_vec().into());
    load::run(until, writers, move |index| {
        let store = Arc::clone(&store);
        let transaction = Transaction::one(
            Key::from_text(format!("leases/default/bench-{index}")),
            Expected::Absent,
            put.clone(),
        )
        .and(namespace.clone(), Expected::Revision(revision), Write::Check);
        async move { Ok(store.commit(transaction).await.map(drop)?) }
    })
    .await
}

/// A service that does nothing.
struct Nothing;

type Answers<T> = BoxStream<'static, Result<T, Status>>;

fn not_here<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("only Create is measured"))
}

#[tonic::async_trait]
impl Objects for Nothing {
    async fn create(&self, request: Request<CreateRequest>) -> Result<Response<Object>, Status> {
        Ok(Response::new(request.into_inner().object.unwrap_or_default()))
    }
    async fn get(&self, _: Request<GetRequest>) -> Result<Response<Object>, Status> {
        not_here()
    }
    async fn list(&self, _: Request<ListRequest>) -> Result<Response<ObjectList>, Status> {
        not_here()
    }
    type WatchStream = Answers<WatchEvent>;
    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        not_here()
    }
    async fn update(&self, _: Request<UpdateRequest>) -> Result<Response<Object>, Status> {
        not_here()
    }
    async fn update_status(&self, _: Request<UpdateRequest>) -> Result<Response<Object>, Status> {
        not_here()
    }
    async fn patch(&self, _: Request<PatchRequest>) -> Result<Response<Object>, Status> {
        not_here()
    }
    type ApplyStream = Answers<ApplyResult>;
    async fn apply(&self, _: Request<ApplyRequest>) -> Result<Response<Self::ApplyStream>, Status> {
        not_here()
    }
    async fn delete(&self, _: Request<DeleteRequest>) -> Result<Response<Object>, Status> {
        not_here()
    }
}
