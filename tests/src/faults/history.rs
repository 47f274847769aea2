//! What was written and what was seen of it, and whether the two fit a store that loses nothing. Pure.
//!
//! A [`History`] has every write with what became of it, as far as its writer knows, what Gets returned, everything that each watcher was
//! told, and the end as a list shows it. [`check`] finds every way in which they contradict a single ordered sequence of revisions:
//! acknowledged writes are in it, refused ones are not, unknown ones (no answer came) are for everybody or for nobody.

mod check;
#[cfg(test)]
mod tests;
mod versions;

use std::{collections::BTreeMap, fmt};

pub use check::check;

/// A revision of the store.
pub type Revision = u64;

/// What a write makes of a key, or an event says of it. Every value is written once only, so an event names its write.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// The key has this value.
    Put(String),
    /// The key is not there.
    Delete,
}

/// What its writer knows of a write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It was acknowledged, with this revision.
    Acknowledged(Revision),
    /// It was refused: it did not happen and will not.
    Refused,
    /// No answer came: it happened, or not, or does so later.
    Unknown,
}

/// A write. `begun` and `ended` are readings of one counter that all writers share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// Where.
    pub key: String,
    /// What.
    pub change: Change,
    /// What it was to replace and nothing else: the key as this revision left it; 0: a key that is not there.
    pub base: Option<Revision>,
    /// Before it was sent.
    pub begun: u64,
    /// After its answer, or after it was given up.
    pub ended: u64,
    /// What became of it.
    pub outcome: Outcome,
}

/// A Get that was answered, with readings of the same counter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    /// Of what.
    pub key: String,
    /// Before it was sent.
    pub begun: u64,
    /// After its answer.
    pub ended: u64,
    /// The value, and the revision of its last write; `None`: it is not there.
    pub found: Option<(String, Revision)>,
}

/// Everything that is there at a revision: key -> (value, revision of its last write).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The revision.
    pub revision: Revision,
    /// The objects.
    pub objects: BTreeMap<String, (String, Revision)>,
}

/// The kinds of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The key was not there before.
    Added,
    /// It was.
    Modified,
    /// It was, and is not any more.
    Deleted,
}

/// What a watcher was told, in its order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// It began with a list: at first, and whenever it was told that its revision is compacted.
    Listed(Snapshot),
    /// It began anew after this revision, the last that it had been told.
    Resumed(Revision),
    /// A change.
    Event {
        /// Its revision.
        revision: Revision,
        /// Its key.
        key: String,
        /// ADDED, MODIFIED, DELETED.
        kind: Kind,
        /// What the key is now.
        change: Change,
    },
    /// Everything up to this revision was told.
    Bookmark(Revision),
}

/// All that was recorded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct History {
    /// Every write.
    pub writes: Vec<Write>,
    /// Every Get that was answered.
    pub reads: Vec<Read>,
    /// Every watcher's own story.
    pub watchers: Vec<Vec<Seen>>,
    /// What is there in the end.
    pub end: Snapshot,
}

/// A contradiction. Watchers count from 0.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are what the variants' sentences speak of")]
pub enum Violation {
    /// An acknowledged write is not in the history, or another change has its revision.
    Lost {
        key: String,
        change: Change,
        revision: Revision,
    },
    /// A refused write was seen, or a value that nobody wrote (at that revision).
    Ghost {
        key: String,
        change: Change,
        revision: Revision,
    },
    /// One write has two revisions.
    Twice {
        key: String,
        change: Change,
        revisions: (Revision, Revision),
    },
    /// A watcher was told a revision that is not above the last one.
    OutOfOrder {
        watcher: usize,
        revision: Revision,
        after: Revision,
    },
    /// A watcher was not told a revision that lies in what it followed.
    Missed { watcher: usize, revision: Revision },
    /// Two watchers were told different changes of one revision.
    Disagree {
        revision: Revision,
        one: (String, Change),
        other: (String, Change),
    },
    /// ADDED of what was there, or MODIFIED or DELETED of what was not.
    WrongKind {
        watcher: usize,
        revision: Revision,
        key: String,
        kind: Kind,
    },
    /// A write that began after another was acknowledged has a smaller revision than that.
    Reordered { earlier: Revision, later: Revision },
    /// A list (the end's, or a watcher's) differs from the sum of the changes before it at this key.
    WrongSnapshot {
        revision: Revision,
        key: String,
        listed: Option<String>,
        expected: Option<String>,
    },
    /// A write that was to replace one revision of a key, or a key that is not there (0), replaced another: two have won, or a write was
    /// undone unseen.
    Overwrote {
        key: String,
        base: Revision,
        revision: Revision,
        replaced: Revision,
    },
    /// A write was refused though what it was to replace was never replaced.
    NoWinner { key: String, base: Revision },
    /// A Get returned what is older than what was acknowledged or read before it began; `None`: nothing.
    StaleRead {
        key: String,
        returned: Option<Revision>,
        known: Revision,
    },
    /// Nobody followed what came after this revision, so nothing can be said of it.
    Uncovered { after: Revision },
}

impl fmt::Display for Violation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost { key, change, revision } => {
                write!(
                    formatter,
                    "an acknowledged write is lost: {change:?} of {key} at revision {revision}"
                )
            }
            Self::Ghost { key, change, revision } => {
                write!(
                    formatter,
                    "{change:?} of {key} at revision {revision} was never written, or was refused"
                )
            }
            Self::Twice {
                key,
                change,
                revisions: (one, other),
            } => {
                write!(
                    formatter,
                    "one write, {change:?} of {key}, has the revisions {one} and {other}"
                )
            }
            Self::OutOfOrder {
                watcher,
                revision,
                after,
            } => {
                write!(
                    formatter,
                    "watcher {watcher} was told revision {revision} after {after}"
                )
            }
            Self::Missed { watcher, revision } => {
                write!(formatter, "watcher {watcher} was not told revision {revision}")
            }
            Self::Disagree { revision, one, other } => {
                write!(
                    formatter,
                    "revision {revision} is {one:?} to one watcher and {other:?} to another"
                )
            }
            Self::WrongKind {
                watcher,
                revision,
                key,
                kind,
            } => {
                write!(
                    formatter,
                    "watcher {watcher} was told {kind:?} of {key} at revision {revision}, which cannot be"
                )
            }
            Self::Reordered { earlier, later } => write!(
                formatter,
                "a write was acknowledged at revision {earlier} before another began, which has revision {later}"
            ),
            Self::WrongSnapshot {
                revision,
                key,
                listed,
                expected,
            } => {
                write!(
                    formatter,
                    "a list at revision {revision} has {listed:?} at {key}, the changes before it {expected:?}"
                )
            }
            Self::Overwrote {
                key,
                base,
                revision,
                replaced,
            } => write!(
                formatter,
                "the write of {key} at revision {revision} was to replace revision {base} and replaced {replaced}"
            ),
            Self::NoWinner { key, base } => write!(
                formatter,
                "a write was refused that was to replace revision {base} of {key}, which nothing replaced"
            ),
            Self::StaleRead { key, returned, known } => write!(
                formatter,
                "a Get of {key} returned revision {returned:?} when {known} was known"
            ),
            Self::Uncovered { after } => write!(formatter, "no watcher followed what came after revision {after}"),
        }
    }
}
