//! Apply.

use std::sync::Arc;

use orlop_proto::api::v1::{ApplyRequest, ApplyResult};
use tonic::Status;

use super::{Answers, ObjectsService};

/// Applies an object or a manifest.
pub(super) async fn apply(_: &ObjectsService, _: Arc<str>, _: ApplyRequest) -> Result<Answers<ApplyResult>, Status> {
    Err(Status::unimplemented("apply"))
}
