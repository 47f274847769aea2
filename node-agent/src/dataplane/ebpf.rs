//! The dataplane in the kernel.

mod pods;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use orlop_ebpf_abi as abi;

use super::{
    Applied, Config, Counters, Dataplane, DataplaneError, NetworkCounters, PodInterface, Report, ServiceChanges,
    arena::Arena,
    bpf, counters, failed,
    kernel::Kernel,
    logs,
    planner::{Limits, Planner, Retired, Writes},
    tables, verify,
};
use pods::Hooks;

/// [`Dataplane`] with eBPF. Cheap to clone.
#[derive(Clone)]
pub struct EbpfDataplane {
    inner: Arc<Inner>,
    /// Tells a thread that something was retired. It ends when the last sender is gone.
    retired: Sender<()>,
}

struct Inner {
    config: Config,
    kernel: Kernel,
    arena: Arena,
    state: Mutex<State>,
    /// Something was released.
    released: Condvar,
    _logs: Option<logs::Reader>,
}

struct State {
    planner: Planner,
    /// What waits for a grace period to begin.
    retired: Vec<Retired>,
    /// The thread has taken some of it and waits for its end.
    releasing: bool,
    /// The map that had no room for the last write.
    full: Option<&'static str>,
    /// A write failed: what is in the maps is to be read again before the next.
    unsure: bool,
    /// What is attached, by pod uid.
    pods: BTreeMap<String, Hooks>,
    /// The last CPU times told; a figure never goes back.
    cpu: HashMap<u64, u64>,
    total: Applied,
}

impl EbpfDataplane {
    /// Loads or adopts programs and maps, and attaches them. Services that an earlier life wrote go on being served until the
    /// first complete change.
    ///
    /// # Errors
    /// See [`Kernel::start`].
    pub fn start(config: Config) -> Result<Self, DataplaneError> {
        let kernel = Kernel::start(&config)?;
        let map = kernel.map(abi::ARENA);
        let arena = Arena::map(&map.fd, map.info.max_entries).map_err(|error| failed("map the arena", error))?;
        let program = bpf::program_info(kernel.program("connect4")).map_err(|error| failed("read a program", error))?;
        let logs = match logs::Reader::start(program.id) {
            Ok(reader) => Some(reader),
            Err(error) => {
                tracing::warn!(error = %error, "the programs' log is not read");
                None
            }
        };
        let planner = adopt(&kernel, &arena)?;
        let state = State {
            planner,
            retired: Vec::new(),
            releasing: false,
            full: None,
            unsure: false,
            pods: BTreeMap::new(),
            cpu: HashMap::new(),
            total: Applied::default(),
        };
        let inner = Arc::new(Inner {
            config,
            kernel,
            arena,
            state: Mutex::new(state),
            released: Condvar::new(),
            _logs: logs,
        });
        inner.adopt_pods()?;
        let (sender, receiver) = channel();
        let background = Arc::downgrade(&inner);
        thread::Builder::new()
            .name("dataplane-gc".into())
            .spawn(move || collect(&receiver, &background))
            .map_err(|error| failed("start a thread", error))?;
        Ok(Self { inner, retired: sender })
    }

    /// [`Dataplane::apply`], in this thread; says what it wrote.
    ///
    /// # Errors
    /// As there.
    pub fn apply_now(&self, changes: &ServiceChanges) -> Result<Applied, DataplaneError> {
        let inner = &*self.inner;
        let mut state = inner.lock();
        if state.unsure {
            if !changes.complete {
                // Of the services that are not named here nothing is known but their entries: they could not be removed later.
                let reason = "the maps are to be read again, and then need all services";
                return Err(failed("write services", reason));
            }
            // What was retired is not in the maps, so it is free again; the thread must not free it twice.
            while state.releasing {
                state = inner.released.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.retired.clear();
            state.planner = adopt(&inner.kernel, &inner.arena)?;
        }
        // Until it is written: a panic on the way must not leave a planner that knows more than the maps.
        state.unsure = true;
        let begin = Instant::now();
        let writes = state.planner.apply(changes);
        let planned = begin.elapsed();
        let mut applied = inner.write(&mut state, writes)?;
        tracing::debug!(
            frontends = applied.frontends_written,
            slots = applied.slots_written,
            planning_us = micros(planned),
            writing_us = micros(begin.elapsed() - planned),
            "maps written"
        );
        let mut full = state.full;
        // There may be room once what was given up is free.
        while full.is_some() && (state.releasing || !state.retired.is_empty()) {
            state = inner.release_all(state)?;
            let writes = state.planner.retry();
            applied = applied.plus(inner.write(&mut state, writes)?);
            full = state.full;
        }
        let waiting = !state.retired.is_empty();
        drop(state);
        if waiting {
            // The thread lives as long as this sender.
            let _sent = self.retired.send(());
        }
        match full {
            Some(map) => Err(DataplaneError::Full { map: map.to_owned() }),
            None => Ok(applied),
        }
    }

    /// [`Dataplane::read_counters`], in this thread.
    ///
    /// # Errors
    /// As there.
    pub fn read_counters_now(&self) -> Result<Counters, DataplaneError> {
        let inner = &*self.inner;
        let mut state = inner.lock();
        let reading = |what: &str| format!("read counters of {what}");
        let mut cpu = counters::cpu(&inner.kernel).map_err(|error| failed(reading("CPU time"), error))?;
        counters::forget_gone_containers(&inner.kernel, &cpu, &state.cpu)
            .map_err(|error| failed(reading("CPU time"), error))?;
        for (id, time) in &mut cpu {
            *time = (*time).max(state.cpu.get(id).copied().unwrap_or(0));
        }
        state.cpu.clone_from(&cpu);
        let traffic =
            counters::traffic(inner.kernel.map(abi::TRAFFIC)).map_err(|error| failed(reading("traffic"), error))?;
        let network_by_pod = state
            .pods
            .iter()
            .filter_map(|(uid, hooks)| Some((uid.clone(), *traffic.get(&hooks.index)?)))
            .collect::<HashMap<String, NetworkCounters>>();
        let services =
            counters::services(&inner.kernel, &state.planner).map_err(|error| failed(reading("services"), error))?;
        Ok(Counters {
            cpu_by_cgroup: cpu,
            network_by_pod,
            services,
        })
    }

    /// Compares what was applied with what is in the kernel.
    ///
    /// # Errors
    /// Something cannot be read at all.
    pub fn verify_now(&self) -> Result<Report, DataplaneError> {
        let services: Vec<_> = self.inner.lock().planner.services().cloned().collect();
        verify::verify(&self.inner.config, &services, &self.pod_interfaces())
    }

    /// What all calls of `apply` together wrote since the start.
    #[must_use]
    pub fn written(&self) -> Applied {
        self.inner.lock().total
    }

    /// What is loaded and pinned.
    #[must_use]
    pub fn kernel(&self) -> &Kernel {
        &self.inner.kernel
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, DataplaneError> + Send + 'static,
    ) -> Result<T, DataplaneError> {
        let this = self.clone();
        tokio::task::spawn_blocking(move || work(&this))
            .await
            .map_err(|error| failed("run in the background", error))?
    }
}

#[async_trait]
impl Dataplane for EbpfDataplane {
    async fn apply(&self, changes: ServiceChanges) -> Result<(), DataplaneError> {
        self.blocking(move |this| this.apply_now(&changes).map(drop)).await
    }

    async fn attach_pod(&self, interface: PodInterface) -> Result<(), DataplaneError> {
        self.blocking(move |this| this.attach_pod_now(&interface)).await
    }

    async fn detach_pod(&self, pod_uid: &str) -> Result<(), DataplaneError> {
        let uid = pod_uid.to_owned();
        self.blocking(move |this| this.detach_pod_now(&uid)).await
    }

    async fn repair(&self) -> Result<Vec<String>, DataplaneError> {
        self.blocking(Self::repair_now).await
    }

    async fn read_counters(&self) -> Result<Counters, DataplaneError> {
        self.blocking(Self::read_counters_now).await
    }

    fn serves(&self) -> bool {
        self.inner.lock().planner.entries().next().is_some()
    }

    fn health(&self) -> Result<(), String> {
        verify::health(&self.inner.kernel)
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, state: &mut State, writes: Writes) -> Result<Applied, DataplaneError> {
        state.full = writes.full;
        state.unsure = true;
        tables::write(&self.kernel, &self.arena, &writes).map_err(|error| failed("write services", error))?;
        state.unsure = false;
        let count = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
        let applied = Applied {
            frontends_written: count(writes.frontends.len()),
            frontends_deleted: count(writes.deletions.len()),
            slots_written: count(writes.slots.len()),
        };
        state.total = state.total.plus(applied);
        if !writes.retired.is_empty() {
            state.retired.push(writes.retired);
        }
        Ok(applied)
    }

    /// Waits for a grace period and makes all that was retired usable, what the thread has taken too.
    fn release_all<'a>(&'a self, mut state: MutexGuard<'a, State>) -> Result<MutexGuard<'a, State>, DataplaneError> {
        let batch = std::mem::take(&mut state.retired);
        if !batch.is_empty() {
            grace_period();
        }
        self.release(&mut state, &batch)?;
        while state.releasing {
            state = self.released.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(state)
    }

    /// After the grace period: zeroes slots and counters, then they can be used again.
    fn release(&self, state: &mut State, batch: &[Retired]) -> Result<(), DataplaneError> {
        for retired in batch {
            let zeroed = retired
                .ranges
                .iter()
                .try_for_each(|(base, length)| self.arena.clear(*base, *length).map(drop));
            let cleared = zeroed
                .and_then(|()| counters::clear_ids(self.kernel.map(abi::SERVICE_COUNTERS), &retired.services))
                .and_then(|()| counters::clear_ids(self.kernel.map(abi::BACKEND_COUNTERS), &retired.backends));
            if let Err(error) = cleared {
                // What is free is found again in the maps before the next write.
                state.unsure = true;
                return Err(failed("zero slots and counters that were given up", error));
            }
            state.planner.release(retired);
        }
        Ok(())
    }
}

/// Reads the maps, deletes what cannot be right, zeroes what nothing refers to.
fn adopt(kernel: &Kernel, arena: &Arena) -> Result<Planner, DataplaneError> {
    let map = kernel.map(abi::FRONTENDS);
    let (frontends, foreign) = tables::read(map).map_err(|error| failed("read the frontends", error))?;
    let limits = Limits {
        frontends: map.info.max_entries,
        slots: arena.slots(),
    };
    for (_, value) in &frontends {
        // Else what cannot be read now would count as wrong, and go.
        arena
            .ensure(value.base, value.ready.saturating_add(value.terminating))
            .map_err(|error| failed("map the arena", error))?;
    }
    let (planner, wrong) = Planner::adopt(limits, &frontends, |index| arena.read(index));
    if !wrong.is_empty() || !foreign.is_empty() {
        tracing::warn!(
            entries = wrong.len() + foreign.len(),
            "frontends that cannot be right are deleted"
        );
        tables::delete(kernel, &wrong).map_err(|error| failed("delete frontends", error))?;
        for key in &foreign {
            bpf::delete(&map.fd, key).map_err(|error| failed("delete frontends", error))?;
        }
    }
    // An earlier life may have ended between a flip and the grace period after it.
    grace_period();
    for (base, length) in planner.free_ranges() {
        arena
            .clear(base, length)
            .map_err(|error| failed("map the arena", error))?;
    }
    counters::clear(kernel.map(abi::SERVICE_COUNTERS), |id| planner.service_id_is_free(id))
        .and_then(|()| counters::clear(kernel.map(abi::BACKEND_COUNTERS), |id| planner.backend_id_is_free(id)))
        .map_err(|error| failed("clear counters", error))?;
    Ok(planner)
}

/// Frees what was retired, a grace period later, many at once.
fn collect(retired: &Receiver<()>, inner: &std::sync::Weak<Inner>) {
    while let Ok(()) = retired.recv() {
        let Some(inner) = inner.upgrade() else { return };
        let batch = {
            let mut state = inner.lock();
            state.releasing = true;
            std::mem::take(&mut state.retired)
        };
        if !batch.is_empty() {
            grace_period();
        }
        let mut state = inner.lock();
        // If a write failed meanwhile, the maps are read again, and free is what they do not use.
        if !state.unsure
            && let Err(error) = inner.release(&mut state, &batch)
        {
            tracing::error!(%error, "what was given up cannot be freed");
        }
        state.releasing = false;
        drop(state);
        inner.released.notify_all();
    }
}

/// Returns when every program that was running has ended: such programs run inside an RCU read section, and the global
/// membarrier waits for one RCU period. Where it is refused (seccomp, nohz_full), time must do; no program takes that long.
fn grace_period() {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    const FALLBACK: Duration = Duration::from_secs(2);
    // SAFETY: membarrier(2) takes numbers only.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result != 0 {
        thread::sleep(FALLBACK);
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
