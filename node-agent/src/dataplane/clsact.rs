//! Counting at an interface on kernels before 6.6, which have no tcx: filters of the `clsact` qdisc. They have no link that
//! could be pinned; they stay with the interface, and are replaced when the agent attaches again.

use std::{io, path::Path};

use aya::{
    programs::{
        ProgramError, SchedClassifier, TcAttachType,
        tc::{NlOptions, TcAttachOptions, TcError, qdisc_add_clsact, qdisc_detach_program},
    },
    util::KernelVersion,
};

/// Has the kernel tcx?
#[must_use]
pub fn kernel_has_tcx() -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0))
}

fn side(program: &str) -> TcAttachType {
    if program.ends_with("egress") {
        TcAttachType::Egress
    } else {
        TcAttachType::Ingress
    }
}

/// Attaches the program pinned at `pin`, in the place of one of that name from before.
///
/// # Errors
/// netlink's.
pub fn attach(pin: &Path, program: &str, interface: &str) -> Result<(), ProgramError> {
    match qdisc_add_clsact(interface) {
        Err(error) if !is(&error, libc::EEXIST) => return Err(error.into()),
        _ => {}
    }
    detach(program, interface)?;
    let mut classifier = SchedClassifier::from_pin(pin)?;
    let options = TcAttachOptions::Netlink(NlOptions::default());
    let link = classifier.attach_with_options(interface, side(program), options)?;
    // Dropping the link would detach it.
    std::mem::forget(classifier.take_link(link)?);
    Ok(())
}

/// Detaches it. What is not attached is a success.
///
/// # Errors
/// netlink's.
pub fn detach(program: &str, interface: &str) -> Result<(), ProgramError> {
    match qdisc_detach_program(interface, side(program), program) {
        Err(TcError::IoError(error)) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // No such qdisc.
        Err(error) if is(&error, libc::EINVAL) || is(&error, libc::ENOENT) => Ok(()),
        other => Ok(other?),
    }
}

fn is(error: &TcError, code: i32) -> bool {
    matches!(error, TcError::NetlinkError(error) if error.raw_os_error() == Some(code))
}
