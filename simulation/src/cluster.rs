//! A cluster whose control dies and comes back, whose users try again, and whose nodes go on.

use std::{cell::RefCell, collections::BTreeMap, rc::Rc, sync::Arc, time::Duration};

use orlop_control::{
    cache::ObjectKey,
    registry::{DeleteOptions, Registered, Registry, RegistryError},
    store::{Revision, Store, memory::MemoryStore},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

use crate::{
    adversary::{Adversary, Hardness},
    control::Control,
    mortal::{CrashPoint, Mortal},
    nodes::Node,
    state::State,
    wire::Port,
};

/// A user waits so long for an answer.
const ANSWER: Duration = Duration::from_secs(10);
/// And so long before trying again.
const AGAIN: Duration = Duration::from_millis(300);
/// Everything must have happened by then, in the simulation's time.
const PATIENCE: Duration = Duration::from_secs(3600);
/// Nothing has changed for so long: longer than the controllers' periods, and than the back-offs of a single failure.
const QUIET: Duration = Duration::from_secs(25);
/// The same where failures follow one another: the longest back-off.
const QUIET_AFTER_MANY: Duration = Duration::from_secs(45);

/// What happens to the control processes.
#[derive(Debug, Clone, Default)]
pub struct Fate {
    /// The first process dies here.
    pub crash: Option<CrashPoint>,
    /// The store's adversary, with its seed.
    pub adversary: Option<(Hardness, u64)>,
    /// Each process is a replica of its own, which has to be elected before it acts.
    pub elects: bool,
}

/// See the module.
pub struct Cluster {
    /// What outlives every process.
    pub data: MemoryStore,
    current: watch::Receiver<Option<Registry>>,
    nodes: RefCell<BTreeMap<String, Rc<Node>>>,
    /// Where the nodes' connections go.
    pub ports: watch::Receiver<Option<Port>>,
    first: Arc<Mortal>,
    process: Rc<RefCell<Arc<Mortal>>>,
    is_hindered: bool,
}

impl Cluster {
    /// A fresh one. Must be called within a `LocalSet`.
    pub fn start(fate: &Fate) -> Self {
        let data = MemoryStore::default();
        let (tell, current) = watch::channel(None);
        let store: Arc<dyn Store> = match fate.adversary.clone() {
            Some((hardness, seed)) => Arc::new(Adversary::new(data.clone(), hardness, seed)),
            None => Arc::new(data.clone()),
        };
        let first = Arc::new(Mortal::new(Arc::clone(&store), fate.crash));
        let process = Rc::new(RefCell::new(Arc::clone(&first)));
        let (open, ports) = watch::channel(None);
        let present = Rc::clone(&process);
        let elects = fate.elects;
        tokio::task::spawn_local(async move {
            for number in 1.. {
                let replica = elects.then(|| format!("replica{number}"));
                let process = present.borrow().clone();
                let died = process.died().clone();
                // Dropped with its process, so that nothing of it is left.
                let life = async {
                    let control = Control::start(process, replica).await;
                    tell.send_replace(Some(control.registry.clone()));
                    open.send_replace(Some(Port::open(&control.link, died.clone())));
                    std::future::pending::<()>().await;
                };
                tokio::select! {
                    () = died.cancelled() => {}
                    () = life => {}
                }
                tell.send_replace(None);
                open.send_replace(None);
                sleep(Duration::from_millis(500)).await;
                present.replace(Arc::new(Mortal::new(Arc::clone(&store), None)));
            }
        });
        Self {
            data,
            current,
            nodes: RefCell::default(),
            ports,
            first,
            process,
            is_hindered: fate.adversary.is_some(),
        }
    }

    /// Writes that the first process has asked for; `None` when it has died.
    pub fn writes(&self) -> Option<u64> {
        (!self.first.died().is_cancelled()).then(|| self.first.writes())
    }

    /// Kills the present control process; another one starts soon.
    pub fn kill_control(&self) {
        self.process.borrow().kill();
    }

    /// A machine joins.
    pub fn node(&self, name: &str) {
        let node = Rc::new(Node::new(name, self.current.clone()));
        self.nodes.borrow_mut().insert(name.to_owned(), Rc::clone(&node));
        tokio::task::spawn_local(async move { node.live().await });
    }

    /// Cuts a machine off, or heals that.
    pub fn cut(&self, name: &str, cut: bool) {
        if let Some(node) = self.nodes.borrow().get(name) {
            node.cut.set(cut);
        }
    }

    /// A user's call, repeated until control has answered it.
    pub async fn call<T>(&self, call: impl AsyncFn(Registry) -> Result<T, RegistryError>) -> Result<T, RegistryError> {
        let end = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < end, "control never answered");
            let registry = self.current.borrow().clone();
            if let Some(registry) = registry {
                match timeout(ANSWER, call(registry)).await {
                    Ok(Err(RegistryError::Store(_) | RegistryError::Conflict { .. })) => {}
                    Ok(answer) => return answer,
                    Err(_) => {}
                }
            }
            sleep(AGAIN).await;
        }
    }

    /// Creates, or finds that an earlier attempt did.
    pub async fn create<T: Registered>(&self, object: T) {
        let answer = self.call(async |registry| registry.create(object.clone()).await).await;
        match answer {
            Err(error) if error.is_already_exists() => {}
            answer => drop(answer.expect("the object is good")),
        }
    }

    /// Changes; the change must be one that can be repeated.
    pub async fn modify<T: Registered>(&self, key: &ObjectKey, change: impl Fn(&mut T) + Send + Sync) {
        let change = &change;
        let answer = self.call(async |registry| {
            registry
                .modify(key, move |object: &mut T| {
                    let before = object.clone();
                    change(object);
                    *object != before
                })
                .await
        });
        answer.await.expect("the change is good");
    }

    /// Deletes, or finds that an earlier attempt did.
    pub async fn delete<T: Registered>(&self, key: &ObjectKey, options: &DeleteOptions) {
        let answer = self.call(async |registry| registry.delete::<T>(key, options.clone()).await);
        match answer.await {
            Err(error) if error.is_not_found() => {}
            // A namesake with another uid: the one that was meant is gone.
            Err(RegistryError::Precondition(_)) => {}
            answer => drop(answer.expect("the deletion is good")),
        }
    }

    /// What is stored now.
    pub async fn state(&self) -> State {
        State::read(&self.data).await
    }

    /// The last write that is neither a sign of life nor news.
    async fn last_write(&self) -> Revision {
        let listing = self.data.list("").await.expect("the data are there");
        let told = |key: &str| key.starts_with("leases/") || key.starts_with("events/");
        let records = listing.records.iter().filter(|record| !told(record.key.as_str()));
        // A deletion leaves nothing with its revision: the number of records tells of it.
        let (count, last) = records.fold((0, 0), |(count, last), record| (count + 1, record.revision.max(last)));
        last << 16 | count
    }

    /// Waits until it is so.
    pub async fn until(&self, what: &str, holds: impl Fn(&State) -> bool) -> State {
        let end = Instant::now() + PATIENCE;
        let mut looked = None;
        loop {
            let last = self.last_write().await;
            if looked.replace(last) != Some(last) {
                let state = self.state().await;
                if holds(&state) {
                    return state;
                }
            }
            if Instant::now() > end {
                panic!("it never happened: {what}\n{}", self.state().await.describe());
            }
            sleep(Duration::from_millis(500)).await;
        }
    }

    /// Waits until nothing changes any more, and gives what there is then.
    pub async fn settled(&self) -> State {
        let end = Instant::now() + PATIENCE;
        let quiet = if self.is_hindered { QUIET_AFTER_MANY } else { QUIET };
        let mut last = self.last_write().await;
        let mut since = Instant::now();
        while since.elapsed() < quiet {
            sleep(Duration::from_secs(1)).await;
            let now = self.last_write().await;
            if now != last {
                (last, since) = (now, Instant::now());
            }
            if Instant::now() > end {
                panic!("it never comes to rest\n{}", self.state().await.describe());
            }
        }
        self.state().await
    }
}
