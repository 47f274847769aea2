//! Image garbage collection: when the disk that images are on is fuller than a threshold, unused images go, the one that was
//! unused for longest first, until it is no fuller than a lower one. As the kubelet does, with its defaults.
//!
//! An image is used while a pod that this node is to run names it, or a container was made from it. [`next`] decides; [`run`] acts,
//! and measures the disk again after every image: how much one frees is known only then, for images share layers.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use serde::Deserialize;
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{Runtime, RuntimeError, reference::Reference};
use crate::desired::Desired;

/// `[images.gc]`: when unused images go.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GcSettings {
    /// When more than this part of the disk is used, in percent, unused images go. Default 85; 100 switches it off. The kubelet's
    /// imageGCHighThresholdPercent.
    pub high_threshold_percent: u64,
    /// Until no more than this part is used. Default 80. The kubelet's imageGCLowThresholdPercent.
    pub low_threshold_percent: u64,
    /// Images that this agent has known for fewer seconds stay. Default 120. The kubelet's imageMinimumGCAge.
    pub minimum_age_seconds: u64,
    /// Seconds between two looks at the disk. Default 300.
    pub interval_seconds: u64,
}

impl Default for GcSettings {
    fn default() -> Self {
        Self {
            high_threshold_percent: 85,
            low_threshold_percent: 80,
            minimum_age_seconds: 120,
            interval_seconds: 300,
        }
    }
}

impl GcSettings {
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), &'static str> {
        if self.high_threshold_percent > 100 {
            return Err("gc.high_threshold_percent is a part of the disk, 0 to 100");
        }
        if self.low_threshold_percent >= self.high_threshold_percent {
            return Err("gc.low_threshold_percent must be below gc.high_threshold_percent");
        }
        if self.interval_seconds == 0 {
            return Err("gc.interval_seconds must be at least 1");
        }
        Ok(())
    }
}

/// Whether nobody wants an image of this name.
pub type Unwanted<'a> = &'a (dyn Fn(&str) -> bool + Send + Sync);

/// The images of this node and the disk that they are on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageStore {
    /// The disk's size in bytes.
    pub disk_total: u64,
    /// What others than root may still write there, in bytes.
    pub disk_free: u64,
    /// The images' names, and whether a container was made from each, or the runtime needs it.
    pub images: BTreeMap<String, bool>,
}

impl ImageStore {
    /// How much of the disk is used, in percent, rounded up; 0 of a disk of no size.
    pub fn used_percent(&self) -> u64 {
        let used = u128::from(self.disk_total.saturating_sub(self.disk_free));
        let percent = (used * 100).div_ceil(u128::from(self.disk_total.max(1)));
        u64::try_from(percent).unwrap_or(100)
    }
}

/// What is known of images from earlier looks.
#[derive(Debug, Clone, Default)]
pub struct History(BTreeMap<String, Known>);

#[derive(Debug, Clone)]
struct Known {
    /// `None` for those that were there before the agent. By a clock that nobody sets, as the next.
    first_seen: Option<Instant>,
    last_used: Option<Instant>,
}

impl History {
    /// Takes a look into account. Images that the first one finds are old.
    pub fn note(&mut self, store: &ImageStore, wanted: &BTreeSet<String>, first: bool, now: Instant) {
        self.0.retain(|name, _| store.images.contains_key(name));
        let seen = (!first).then_some(now);
        for (name, in_use) in &store.images {
            let known = self.0.entry(name.clone()).or_insert(Known {
                first_seen: seen,
                last_used: None,
            });
            if *in_use || wanted.contains(name) {
                known.last_used = Some(now);
            }
        }
    }
}

/// The image to be removed next, if one is: of those that are unused and old enough the one that was unused for longest.
pub fn next<'a>(
    store: &'a ImageStore,
    wanted: &BTreeSet<String>,
    history: &History,
    settings: &GcSettings,
    now: Instant,
) -> Option<&'a str> {
    let old = |known: &Known| {
        let age = known.first_seen.map(|seen| now.saturating_duration_since(seen));
        age.is_none_or(|age| age.as_secs() >= settings.minimum_age_seconds)
    };
    let candidates = store.images.iter().filter_map(|(name, in_use)| {
        let known = history.0.get(name)?;
        let unused = !in_use && !wanted.contains(name) && old(known);
        unused.then_some((known.last_used, known.first_seen, name.as_str()))
    });
    candidates.min().map(|(_, _, name)| name)
}

/// The names of the images that the node's pods want. One that is no image's name wants none.
pub fn wanted(desired: &Desired) -> BTreeSet<String> {
    let containers = desired.pods.values().flat_map(|pod| {
        let spec = pod.spec.as_ref();
        spec.map(|spec| spec.containers.as_slice()).unwrap_or_default()
    });
    let references = containers.filter_map(|container| Reference::parse(&container.image).ok());
    references.map(|reference| reference.to_string()).collect()
}

/// Looks at the disk every now and then until `stop`, and removes what is to go.
pub async fn run(
    runtime: Arc<dyn Runtime>,
    desired: watch::Receiver<Arc<Desired>>,
    settings: GcSettings,
    stop: CancellationToken,
) {
    let mut history = History::default();
    let mut first = true;
    loop {
        match collect(&*runtime, &desired, &settings, &mut history, first).await {
            Ok(looked) => first &= !looked,
            Err(error) => tracing::warn!(%error, "image garbage collection failed; it is tried again"),
        }
        tokio::select! {
            // Both are cancel-safe: they hold nothing.
            () = stop.cancelled() => return,
            () = tokio::time::sleep(Duration::from_secs(settings.interval_seconds)) => {}
        }
    }
}

/// One look; says whether there was something to look at.
async fn collect(
    runtime: &dyn Runtime,
    desired: &watch::Receiver<Arc<Desired>>,
    settings: &GcSettings,
    history: &mut History,
    first: bool,
) -> Result<bool, RuntimeError> {
    let wants = || wanted(&desired.borrow());
    if !desired.borrow().complete {
        // Nothing is known to be unwanted before control or the ledger has named all pods.
        return Ok(false);
    }
    let Some(mut store) = runtime.images().await? else {
        return Ok(false);
    };
    history.note(&store, &wants(), first, Instant::now());
    let begin = store.used_percent();
    if begin <= settings.high_threshold_percent || settings.high_threshold_percent == 100 {
        return Ok(true);
    }
    let mut removed = 0;
    while store.used_percent() > settings.low_threshold_percent {
        let now = Instant::now();
        let Some(name) = next(&store, &wants(), history, settings, now).map(str::to_owned) else {
            tracing::warn!(
                used_percent = store.used_percent(),
                wanted_percent = settings.low_threshold_percent,
                removed,
                "the disk of images is too full, and no further unused image is there to be removed"
            );
            return Ok(true);
        };
        // Asked again when nobody can begin to use it.
        match runtime.remove_image(&name, &|name| !wants().contains(name)).await {
            Ok(true) => {
                removed += 1;
                tracing::info!(image = name, "removed an unused image");
            }
            Ok(false) => {}
            // It is first in line the next time, too, and must not keep all others from being removed.
            Err(error) => tracing::warn!(image = name, %error, "an unused image cannot be removed"),
        }
        let disk = runtime.images().await?.unwrap_or_default();
        // What is left is not looked at twice in one round, so each round ends.
        store.images.remove(&name);
        (store.disk_total, store.disk_free) = (disk.disk_total, disk.disk_free);
        for (name, in_use) in disk.images {
            store.images.entry(name).and_modify(|known| *known |= in_use);
        }
    }
    let end = store.used_percent();
    tracing::info!(begin, end, removed, "the disk of images is less full");
    Ok(true)
}

#[cfg(test)]
mod tests;
