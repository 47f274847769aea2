//! What the tests of the API share.

use orlop_control::api::{BadRequest, RpcStatus};
use orlop_proto::{
    api::v1::{
        ApplyRequest, ApplyResult, CreateRequest, DeleteRequest, Object, apply_request::Input, object::Body,
        objects_client::ObjectsClient,
    },
    coordination::v1::Lease,
    core::v1::{Container, Pod, PodSpec},
    meta::v1::ObjectMeta,
};
use prost::Message;
use tonic::{Code, Status, transport::Channel};

pub type Client = ObjectsClient<Channel>;

pub fn pod(name: &str, app: &str) -> Object {
    let labels = [("app".to_owned(), app.to_owned())].into();
    let metadata = Some(ObjectMeta {
        name: name.to_owned(),
        labels,
        ..ObjectMeta::default()
    });
    let container = Container {
        name: "main".to_owned(),
        image: "main:1".to_owned(),
        ..Container::default()
    };
    let spec = Some(PodSpec {
        containers: vec![container],
        ..PodSpec::default()
    });
    Object {
        body: Some(Body::Pod(Pod {
            metadata,
            spec,
            ..Pod::default()
        })),
    }
}

/// Of a kind that no controller touches.
pub fn lease(name: &str, app: &str) -> Object {
    let labels = [("app".to_owned(), app.to_owned())].into();
    let metadata = Some(ObjectMeta {
        name: name.to_owned(),
        labels,
        ..ObjectMeta::default()
    });
    Object {
        body: Some(Body::Lease(Lease {
            metadata,
            ..Lease::default()
        })),
    }
}

pub fn name(object: &Object) -> String {
    object.meta().expect("metadata").name.clone()
}

pub fn version(object: &Object) -> u64 {
    object
        .meta()
        .expect("metadata")
        .resource_version
        .parse()
        .expect("a number")
}

pub async fn create(client: &mut Client, object: Object) -> Object {
    client
        .create(CreateRequest { object: Some(object) })
        .await
        .expect("creates")
        .into_inner()
}

pub async fn remove(client: &mut Client, resource: &str, name: &str) {
    let request = DeleteRequest {
        resource: resource.to_owned(),
        name: name.to_owned(),
        grace_period_seconds: Some(0),
        ..DeleteRequest::default()
    };
    client.delete(request).await.expect("deletes");
}

pub async fn apply(client: &mut Client, manifest: &str) -> Result<Vec<ApplyResult>, Status> {
    let request = ApplyRequest {
        input: Some(Input::Manifest(manifest.to_owned())),
        namespace: String::new(),
    };
    let mut stream = client.apply(request).await?.into_inner();
    let mut results = Vec::new();
    while let Some(result) = stream.message().await? {
        results.push(result);
    }
    Ok(results)
}

pub fn detail<T: Message + Default>(status: &Status) -> T {
    let details = RpcStatus::decode(status.details()).expect("google.rpc.Status");
    assert_eq!(details.code, status.code() as i32);
    T::decode(details.details[0].value.as_slice()).expect("the detail")
}

pub fn fields(status: &Status) -> Vec<String> {
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    detail::<BadRequest>(status)
        .field_violations
        .into_iter()
        .map(|violation| violation.field)
        .collect()
}
