//! Leases.

use std::borrow::Cow;

use orlop_proto::coordination::v1::{Lease, LeaseSpec};

use super::{
    FieldError, Model,
    error::{Errors, Path},
    meta, names,
};

impl Model for Lease {
    fn set_defaults(&mut self) {
        self.spec.get_or_insert_default();
    }

    fn reset_status(&mut self) {}

    fn validate_create(&self) -> Vec<FieldError> {
        let mut errors = Errors::default();
        meta::validate(&mut errors, self, names::dns1123_subdomain);
        validate_spec(&mut errors, self.spec.as_ref());
        errors.into_found()
    }

    fn validate_update(&self, old: &Self) -> Vec<FieldError> {
        let mut errors = Errors::default();
        meta::validate_update(&mut errors, self, old);
        validate_spec(&mut errors, self.spec.as_ref());
        errors.into_found()
    }

    fn validate_status_update(&self, _old: &Self) -> Vec<FieldError> {
        vec![FieldError::forbidden("status", "this kind has no status")]
    }

    fn selectable_field(&self, name: &str) -> Option<Cow<'_, str>> {
        super::selectable_meta(self, name)
    }
}

fn validate_spec(errors: &mut Errors, spec: Option<&LeaseSpec>) {
    let Some(spec) = spec else { return };
    let path = Path::root("spec");
    if let Some(seconds) = spec.lease_duration_seconds.filter(|seconds| *seconds <= 0) {
        errors.invalid(&path.child("leaseDurationSeconds"), &seconds, "must be greater than 0");
    }
    if let Some(transitions) = spec.lease_transitions {
        errors.not_negative(&path.child("leaseTransitions"), transitions.into());
    }
    errors.time(&path.child("acquireTime"), spec.acquire_time.as_ref());
    errors.time(&path.child("renewTime"), spec.renew_time.as_ref());
}
