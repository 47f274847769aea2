use std::sync::{LazyLock, Mutex};

use async_trait::async_trait;
use orlop_proto::core::v1::{Container, Pod, PodSpec};
use tokio::sync::Notify;

use super::*;
use crate::runtime::{ContainerSpec, Image, ImageRequest, Observed, PodId, SandboxSpec};

fn at(second: u64) -> Instant {
    static BEGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
    *BEGIN + Duration::from_secs(second)
}

fn store(free: u64, images: &[(&str, bool)]) -> ImageStore {
    ImageStore {
        disk_total: 100,
        disk_free: free,
        images: images
            .iter()
            .map(|(name, in_use)| ((*name).to_owned(), *in_use))
            .collect(),
    }
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn the_image_that_was_unused_for_longest_goes_first() {
    let settings = GcSettings::default();
    let mut history = History::default();
    let all = store(1, &[("a", false), ("b", false), ("c", true), ("d", false)]);
    history.note(&all, &names(&["a"]), true, at(1000));
    history.note(&all, &names(&["b"]), false, at(2000));
    let mut left = store(1, &[("a", false), ("b", false), ("c", true), ("d", false)]);
    let mut gone = Vec::new();
    while let Some(name) = next(&left, &names(&[]), &history, &settings, at(3000)).map(str::to_owned) {
        left.images.remove(&name);
        gone.push(name);
    }
    assert_eq!(gone, ["d", "a", "b"], "c is in use");
    assert_eq!(
        next(&all, &names(&["a", "b", "d"]), &history, &settings, at(3000)),
        None,
        "all are wanted"
    );
}

#[test]
fn young_images_stay() {
    let settings = GcSettings::default();
    let mut history = History::default();
    history.note(&store(1, &[]), &names(&[]), true, at(1000));
    let one = store(1, &[("a", false)]);
    history.note(&one, &names(&[]), false, at(1000));
    assert_eq!(next(&one, &names(&[]), &history, &settings, at(1119)), None);
    assert_eq!(next(&one, &names(&[]), &history, &settings, at(1120)), Some("a"));
}

#[test]
fn a_disk_is_as_full_as_it_is() {
    let percent = |total, free| {
        let store = ImageStore {
            disk_total: total,
            disk_free: free,
            ..ImageStore::default()
        };
        store.used_percent()
    };
    assert_eq!(
        [percent(100, 100), percent(100, 15), percent(1000, 149), percent(0, 0)],
        [0, 85, 86, 0]
    );
    assert_eq!(percent(u64::MAX, 0), 100);
}

/// A disk of 100 on which every image takes 10; one image is kept, and one cannot be removed.
struct Fake(Mutex<BTreeMap<String, bool>>);

#[async_trait]
impl Runtime for Fake {
    async fn images(&self) -> Result<Option<ImageStore>, RuntimeError> {
        let images = self.0.lock().unwrap().clone();
        Ok(Some(ImageStore {
            disk_total: 100,
            disk_free: 100 - 10 * images.len() as u64,
            images,
        }))
    }
    async fn remove_image(&self, name: &str, unwanted: Unwanted<'_>) -> Result<bool, RuntimeError> {
        if name.ends_with("/broken:latest") {
            return Err(RuntimeError::InvalidSpec("as containerd would".to_owned()));
        }
        let kept = name.ends_with("/kept:latest") || !unwanted(name);
        Ok(!kept && self.0.lock().unwrap().remove(name).is_some())
    }
    async fn observe(&self) -> Result<Observed, RuntimeError> {
        unreachable!()
    }
    fn changed(&self) -> Arc<Notify> {
        unreachable!()
    }
    async fn ensure_image(&self, _: &ImageRequest) -> Result<Image, RuntimeError> {
        unreachable!()
    }
    async fn create_sandbox(&self, _: &SandboxSpec) -> Result<(), RuntimeError> {
        unreachable!()
    }
    async fn start_container(&self, _: &ContainerSpec) -> Result<(), RuntimeError> {
        unreachable!()
    }
    async fn signal(&self, _: &str, _: i32) -> Result<(), RuntimeError> {
        unreachable!()
    }
    async fn remove_container(&self, _: &PodId, _: &str) -> Result<(), RuntimeError> {
        unreachable!()
    }
    async fn remove_sandbox(&self, _: &PodId, _: &str) -> Result<(), RuntimeError> {
        unreachable!()
    }
    async fn remove_pod(&self, _: &PodId) -> Result<(), RuntimeError> {
        unreachable!()
    }
    async fn disk_usage(&self) -> Result<BTreeMap<String, u64>, RuntimeError> {
        unreachable!()
    }
    async fn version(&self) -> Result<String, RuntimeError> {
        unreachable!()
    }
}

#[tokio::test]
async fn it_begins_above_one_threshold_and_ends_at_the_other() {
    let images = ["r/kept", "r/wanted", "r/x:1", "r/x:2", "r/x:3", "r/x:4"];
    let images = images.map(|image| (Reference::parse(image).unwrap().to_string(), false));
    let runtime = Fake(Mutex::new(images.into()));
    let container = Container {
        image: "r/wanted".into(),
        ..Container::default()
    };
    let spec = PodSpec {
        containers: vec![container],
        ..PodSpec::default()
    };
    let pod = Pod {
        spec: Some(spec),
        ..Pod::default()
    };
    let mut desired = Desired::default();
    desired.pods.insert("uid".into(), Arc::new(pod));
    let (sender, receiver) = watch::channel(Arc::new(desired.clone()));
    let settings = |high, low| GcSettings {
        high_threshold_percent: high,
        low_threshold_percent: low,
        ..GcSettings::default()
    };
    let left = |runtime: &Fake| runtime.0.lock().unwrap().len();
    let mut history = History::default();
    let looked = collect(&runtime, &receiver, &settings(10, 0), &mut history, true).await;
    assert!(!looked.unwrap(), "what is wanted is not known yet");
    assert_eq!(left(&runtime), 6);
    desired.complete = true;
    sender.send_replace(Arc::new(desired));
    for (high, low, remain) in [(60, 10, 6), (100, 0, 6), (59, 40, 4), (30, 0, 2)] {
        let settings = settings(high, low);
        collect(&runtime, &receiver, &settings, &mut history, true)
            .await
            .unwrap();
        assert_eq!(left(&runtime), remain, "{high} {low}");
    }
    let kept: Vec<String> = runtime.0.lock().unwrap().keys().cloned().collect();
    assert!(
        kept.iter().all(|name| name.contains("kept") || name.contains("wanted")),
        "{kept:?}"
    );
}

#[tokio::test]
async fn an_image_that_cannot_be_removed_keeps_no_other() {
    let images = ["r/broken", "r/x:1", "r/x:2"];
    let images = images.map(|image| (Reference::parse(image).unwrap().to_string(), false));
    let runtime = Fake(Mutex::new(images.into()));
    let complete = Desired {
        complete: true,
        ..Desired::default()
    };
    let (_sender, receiver) = watch::channel(Arc::new(complete));
    let settings = GcSettings {
        high_threshold_percent: 10,
        low_threshold_percent: 0,
        ..GcSettings::default()
    };
    let looked = collect(&runtime, &receiver, &settings, &mut History::default(), true).await;
    assert!(looked.unwrap());
    let left: Vec<String> = runtime.0.lock().unwrap().keys().cloned().collect();
    assert_eq!(left, [Reference::parse("r/broken").unwrap().to_string()]);
}
