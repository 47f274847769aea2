//! The node's end of the link to control: `orlop.node.v1.NodeLink`.
//!
//! [`run`] dials, keeps a session and dials again; [`Applier`] turns what control says into [`Desired`], the ledger and the
//! dataplane's maps; [`Reports`] keeps what the node has to say until control has it. Without control nothing here fails:
//! what was last told stays in force.
//!
//! [`Desired`]: crate::desired::Desired

mod applier;
mod dial;
mod reports;
mod session;

#[doc(hidden)]
pub use applier::told;
pub use applier::{Applier, ApplierHandle};
pub use dial::{Dial, DialError, TlsDialer, connect};
pub use reports::{Reports, carry};
pub use session::{Hello, SessionError, run};

/// The version of the link's protocol that this agent speaks.
pub const PROTOCOL: u32 = 1;
