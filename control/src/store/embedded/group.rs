//! Which requests share a commit.
//!
//! Writers that wait for the answer of one write before they send the next come back a moment after a commit. A commit that
//! began with the first of them would leave the others for the next one, and so, for ever, every writer would wait for two
//! commits. So after a commit of many the next one waits, for a small part of the time that a commit takes, until as many are there.

use std::time::{Duration, Instant};

use tokio::sync::mpsc::Receiver;

use super::Request;

/// Transactions in one commit.
const MOST: usize = 2048;
/// Bytes in one commit, about.
const MOST_BYTES: usize = 16 * 1024 * 1024;
/// After a commit of fewer nobody is waited for: their next write would not gain what this one loses.
const MANY: usize = 8;
/// The part of a commit's time that is spent on waiting, at most.
const PART: u32 = 4;
/// Between two looks at the queue.
const STEP: Duration = Duration::from_micros(50);

/// What the last commit tells of the next one.
#[derive(Debug, Default)]
pub(super) struct Gathering {
    expected: usize,
    patience: Duration,
}

impl Gathering {
    /// The requests of the next commit, beginning with one that is there.
    pub(super) fn gather(&self, first: Request, queue: &mut Receiver<Request>) -> Vec<Request> {
        let end = Instant::now() + self.patience;
        let mut bytes = first.transaction.bytes();
        let mut group = vec![first];
        loop {
            while let Ok(next) = queue.try_recv() {
                bytes += next.transaction.bytes();
                group.push(next);
                if group.len() >= MOST || bytes >= MOST_BYTES {
                    return group;
                }
            }
            if group.len() >= self.expected || Instant::now() >= end || queue.is_closed() {
                return group;
            }
            std::thread::sleep(STEP);
        }
    }

    /// So many were committed, and it took so long.
    pub(super) fn committed(&mut self, count: usize, took: Duration) {
        if count < MANY {
            *self = Self::default();
        } else {
            self.expected = count;
            self.patience = took / PART;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::{mpsc, oneshot};

    use super::*;
    use crate::store::Transaction;

    fn request() -> Request {
        Request {
            transaction: Transaction::default(),
            reply: oneshot::channel().0,
        }
    }

    #[test]
    fn what_is_there_goes_together() {
        let (sender, mut queue) = mpsc::channel(16);
        for _ in 0..4 {
            sender.try_send(request()).unwrap();
        }
        assert_eq!(Gathering::default().gather(request(), &mut queue).len(), 5);
        assert_eq!(Gathering::default().gather(request(), &mut queue).len(), 1);
    }

    #[test]
    fn after_many_as_many_are_waited_for() {
        let (sender, mut queue) = mpsc::channel(64);
        let mut gathering = Gathering::default();
        // An hour: it ends when they are there, or when nobody can come any more.
        gathering.committed(20, Duration::from_secs(4 * 3600));
        let late = std::thread::spawn(move || {
            for _ in 0..19 {
                std::thread::sleep(Duration::from_millis(1));
                sender.blocking_send(request()).unwrap();
            }
            sender
        });
        assert_eq!(gathering.gather(request(), &mut queue).len(), 20);
        drop(late.join().unwrap());
        assert_eq!(gathering.gather(request(), &mut queue).len(), 1);
    }

    #[test]
    fn nobody_waits_after_few_and_not_for_ever_after_many() {
        let (_sender, mut queue) = mpsc::channel(16);
        let mut gathering = Gathering::default();
        gathering.committed(MANY, Duration::from_millis(4));
        assert_eq!(gathering.gather(request(), &mut queue).len(), 1);
        gathering.committed(MANY - 1, Duration::from_secs(4 * 3600));
        assert_eq!(gathering.gather(request(), &mut queue).len(), 1);
    }
}
