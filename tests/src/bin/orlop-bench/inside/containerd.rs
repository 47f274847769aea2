//! containerd alone: what it takes to create and start pause and one container for a pod, with nobody around it.
//!
//! The two containers are those of a pod that runs here: the same snapshots' parents, the same runtime specifications but for
//! what tells pods apart (shim group, cgroup, the sandbox's process). No network, no lease, no log.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use anyhow::{Context, Result};
use containerd_client::{
    Client,
    services::v1::{
        Container, CreateContainerRequest, CreateTaskRequest, DeleteContainerRequest, DeleteTaskRequest, KillRequest,
        ListContainersRequest, StartRequest, WaitRequest,
        snapshots::{PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest},
    },
};
use serde_json::Value;
use tokio::task::JoinSet;
use tonic::{Request, metadata::AsciiMetadataValue};

const NAMESPACE: &str = "orlop";
const POD_NAME: &str = "io.kubernetes.pod.name";
const GROUP: &str = "io.containerd.runc.v2.group";

/// A container to be made again and again.
struct Model {
    record: Container,
    spec: Value,
    parent: String,
}

struct Models {
    pause: Model,
    app: Model,
}

/// Prints the seconds that `count` pods took, `parallel` at once.
pub fn run(socket: &str, count: usize, parallel: usize) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let client = Client::from_path(socket).await.context("connecting to containerd")?;
        let models = Arc::new(models(&client).await?);
        let client = Arc::new(client);
        let next = Arc::new(AtomicUsize::new(0));
        let begin = Instant::now();
        let mut workers = JoinSet::new();
        for _ in 0..parallel {
            let (client, models, next) = (Arc::clone(&client), Arc::clone(&models), Arc::clone(&next));
            workers.spawn(async move {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= count {
                        return Ok::<_, anyhow::Error>(());
                    }
                    start_pod(&client, &models, index).await?;
                }
            });
        }
        while let Some(ended) = workers.join_next().await {
            ended??;
        }
        println!("{}", begin.elapsed().as_secs_f64());
        for index in 0..count {
            for kind in ["app", "pause"] {
                remove(
                    &client,
                    &format!("alone-{index}-{kind}"),
                    &models.app.record.snapshotter,
                )
                .await?;
            }
        }
        Ok(())
    })
}

fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let namespace = AsciiMetadataValue::from_static(NAMESPACE);
    request.metadata_mut().insert("containerd-namespace", namespace);
    request
}

/// A pod's two containers, as they run here.
async fn models(client: &Client) -> Result<Models> {
    let list = client
        .containers()
        .list(request(ListContainersRequest::default()))
        .await?
        .into_inner()
        .containers;
    let mut sandboxes = Vec::new();
    let mut others = Vec::new();
    let of_model = |record: &Container| record.labels.get(POD_NAME).is_some_and(|name| name == super::MODEL);
    for record in list.into_iter().filter(of_model) {
        let bytes = &record
            .spec
            .as_ref()
            .context("a container without a specification")?
            .value;
        let spec: Value = serde_json::from_slice(bytes)?;
        let stat = StatSnapshotRequest {
            snapshotter: record.snapshotter.clone(),
            key: record.snapshot_key.clone(),
        };
        let parent = client.snapshots().stat(request(stat)).await?.into_inner();
        let parent = parent.info.unwrap_or_default().parent;
        // A pod's containers join the namespaces of its pause process; pause makes its own but for the network.
        let joins = spec["linux"]["namespaces"]
            .as_array()
            .is_some_and(|all| all.iter().any(|each| path_of(each).starts_with("/proc/")));
        let model = Model { record, spec, parent };
        if joins {
            others.push(model);
        } else {
            sandboxes.push(model);
        }
    }
    let app = others.pop().context("no container runs here")?;
    let group = app.spec["annotations"][GROUP].clone();
    let pause = sandboxes
        .into_iter()
        .find(|model| model.spec["annotations"][GROUP] == group)
        .context("the container's sandbox is not here")?;
    Ok(Models { pause, app })
}

fn path_of(namespace: &Value) -> &str {
    namespace["path"].as_str().unwrap_or_default()
}

async fn start_pod(client: &Client, models: &Models, index: usize) -> Result<()> {
    let group = format!("alone-{index}");
    let pid = start(client, &models.pause, &group, "pause", None).await?;
    start(client, &models.app, &group, "app", Some(pid)).await?;
    Ok(())
}

/// Snapshot, record, task: the pid.
async fn start(client: &Client, model: &Model, group: &str, kind: &str, sandbox: Option<u32>) -> Result<u32> {
    let id = format!("{group}-{kind}");
    let mut spec = model.spec.clone();
    spec["annotations"][GROUP] = group.into();
    let parent = spec["linux"]["cgroupsPath"].as_str().unwrap_or_default();
    let parent = parent.rsplitn(3, '/').last().unwrap_or_default().to_owned();
    spec["linux"]["cgroupsPath"] = format!("{parent}/{group}/{id}").into();
    if let (Some(pid), Some(namespaces)) = (sandbox, spec["linux"]["namespaces"].as_array_mut()) {
        for namespace in namespaces {
            if let Some(rest) = path_of(namespace).strip_prefix("/proc/") {
                let kind = rest.split_once('/').map_or("", |(_, kind)| kind);
                namespace["path"] = format!("/proc/{pid}/{kind}").into();
            }
        }
    }
    let prepare = PrepareSnapshotRequest {
        snapshotter: model.record.snapshotter.clone(),
        key: id.clone(),
        parent: model.parent.clone(),
        // No container names it yet: otherwise containerd's collection may take it.
        labels: [("containerd.io/gc.root".to_owned(), "bench".to_owned())].into(),
    };
    let mounts = client.snapshots().prepare(request(prepare)).await?.into_inner().mounts;
    let record = Container {
        id: id.clone(),
        image: model.record.image.clone(),
        runtime: model.record.runtime.clone(),
        spec: model.record.spec.as_ref().map(|any| prost_types::Any {
            type_url: any.type_url.clone(),
            value: spec.to_string().into_bytes(),
        }),
        snapshotter: model.record.snapshotter.clone(),
        snapshot_key: id.clone(),
        ..Container::default()
    };
    let create = CreateContainerRequest {
        container: Some(record),
    };
    client.containers().create(request(create)).await?;
    let create = CreateTaskRequest {
        container_id: id.clone(),
        rootfs: mounts,
        ..CreateTaskRequest::default()
    };
    client
        .tasks()
        .create(request(create))
        .await
        .context("creating a task")?;
    let start = StartRequest {
        container_id: id,
        exec_id: String::new(),
    };
    Ok(client.tasks().start(request(start)).await?.into_inner().pid)
}

async fn remove(client: &Client, id: &str, snapshotter: &str) -> Result<()> {
    let container_id = id.to_owned();
    let kill = KillRequest {
        container_id: container_id.clone(),
        signal: 9,
        ..KillRequest::default()
    };
    client.tasks().kill(request(kill)).await?;
    let wait = WaitRequest {
        container_id: container_id.clone(),
        exec_id: String::new(),
    };
    client.tasks().wait(request(wait)).await?;
    let delete = DeleteTaskRequest { container_id };
    client.tasks().delete(request(delete)).await?;
    let delete = DeleteContainerRequest { id: id.to_owned() };
    client.containers().delete(request(delete)).await?;
    let key = id.to_owned();
    let snapshotter = snapshotter.to_owned();
    let delete = RemoveSnapshotRequest { snapshotter, key };
    client.snapshots().remove(request(delete)).await?;
    Ok(())
}
