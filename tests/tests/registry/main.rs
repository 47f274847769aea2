//! Images from registries inside the lab, all the way from a manifest: over TLS, with a password and with a token, by tag and by
//! digest, for the platform of the machine, once a node, and through an outage.

mod push;
mod token_service;

use std::{collections::BTreeSet, fs, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use orlop_proto::{
    Resource,
    core::v1::{ContainerStateWaiting, Event, Pod},
};
use orlop_tests::{
    lab::{Lab, Options, output},
    registry::{ADDRESS, BASIC_PORT, MEMBER, OTHER_NAME, TOKEN_PORT},
    supervisor::Request,
};
use push::{Pushed, push};
use token_service::TokenService;

const LONG: Duration = Duration::from_secs(90);

#[test]
fn pods_run_images_of_the_labs_registries() -> Result<()> {
    rustls::crypto::ring::default_provider().install_default().ok();
    let lab = Lab::start(
        "registry",
        &Options {
            nodes: 2,
            registry: true,
            ..Options::default()
        },
    )?;
    let tokens = TokenService::start(&lab)?;
    let app = push(&lab, BASIC_PORT, "team/app")?;
    let guarded = push(&lab, TOKEN_PORT, "team/guarded")?;
    let late = push(&lab, BASIC_PORT, "team/late")?;

    one_pull_a_node(&lab, &app)?;
    by_digest_and_with_a_token(&lab, &app, &guarded, &tokens)?;
    who_is_not_trusted_says_why(&lab, &tokens)?;
    an_outage_is_shown_and_passes(&lab, &late)?;
    lab.finish()
}

/// Six pods of one manifest: each node asks for each blob once, with the password, and for none of another platform.
fn one_pull_a_node(lab: &Lab, app: &Pushed) -> Result<()> {
    lab.client.apply(&replicas("app", 6, &app.name))?;
    let pods = lab.wait_for_pods("app=app", 6)?;
    for pod in &pods {
        let id = image_id(pod);
        ensure!(id.contains(&app.id), "{} runs {id}, not {}", pod.name(), app.id);
    }
    let nodes: BTreeSet<&str> = pods.iter().map(node).collect();
    ensure!(nodes.len() == 2, "both nodes run some: {nodes:?}");
    for digest in [&app.id, &app.layer] {
        let asked = blobs_given(lab, "basic", digest)?;
        ensure!(asked.len() == 2, "{digest} was pulled by {asked:?}");
        ensure!(asked[0] != asked[1], "one node asked twice: {asked:?}");
    }
    for digest in &app.foreign {
        let asked = blobs_given(lab, "basic", digest)?;
        ensure!(asked.is_empty(), "{asked:?} pulled what is for another platform");
    }
    let pulled = lab.client.list::<Event>("default", "")?;
    let pulled = pulled.iter().filter(|event| event.reason == "Pulled");
    let named = pulled.filter(|event| event.message.contains(&app.name)).count();
    ensure!(named > 0, "an event tells of the pull");
    let log = log(lab, "basic")?;
    let challenged = |line: &&str| line.starts_with("192.168.77.") && line.contains("\" 401 ");
    ensure!(
        log.lines().any(|line| challenged(&line)),
        "nobody was asked for a password"
    );
    Ok(())
}

/// The same image by its index's digest is there already. Another registry wants a token, which the nodes get with their password.
fn by_digest_and_with_a_token(lab: &Lab, app: &Pushed, guarded: &Pushed, tokens: &TokenService) -> Result<()> {
    let before = blobs_given(lab, "basic", &app.layer)?.len();
    let by_digest = format!("{ADDRESS}:{BASIC_PORT}/team/app@{}", app.digest);
    lab.client
        .apply(&(of_image("digest", &by_digest) + &of_image("token", &guarded.name)))?;
    for (name, image) in [("digest", app), ("token", guarded)] {
        let pod = lab.wait_for_pod(name)?;
        ensure!(image_id(&pod).contains(&image.id), "{name} runs {}", image_id(&pod));
    }
    let after = blobs_given(lab, "basic", &app.layer)?.len();
    ensure!(
        after == before,
        "what a node has was pulled again: {before}, then {after}"
    );
    let given = blobs_given(lab, "token", &guarded.layer)?;
    ensure!(given.len() == 1, "one pull: {given:?}");
    let pulls = ("repository:team/guarded:pull".to_owned(), true);
    ensure!(tokens.asked().contains(&pulls), "{:?}", tokens.asked());
    Ok(())
}

/// A registry whose CA no configuration names, and one for which it names no password.
fn who_is_not_trusted_says_why(lab: &Lab, tokens: &TokenService) -> Result<()> {
    for name in lab.spec.node_names() {
        let known = format!("echo {ADDRESS} {OTHER_NAME} >>/etc/hosts");
        output(lab.on_node(&name, &["sh", "-c", &known])?)?;
    }
    let images = [
        (
            "stranger",
            format!("{OTHER_NAME}:{BASIC_PORT}/team/app:1"),
            "certificate",
        ),
        (
            "anonymous",
            format!("{OTHER_NAME}:{TOKEN_PORT}/team/guarded:1"),
            "unauthorized",
        ),
    ];
    for (name, image, why) in &images {
        lab.client.apply(&of_image(name, image))?;
        let waiting = wait_for_waiting(lab, name, &["ErrImagePull", "ImagePullBackOff"])?;
        ensure!(waiting.message.contains(why), "{name}: {}", waiting.message);
        lab.client.delete("pods", "default", name, None)?;
    }
    let refused = tokens.asked().iter().any(|(_, given)| !given);
    ensure!(
        refused,
        "the token service was asked without a password: {:?}",
        tokens.asked()
    );
    Ok(())
}

/// The registry is down: what wants a new image waits and says why, all else goes on; it runs when the registry is back.
fn an_outage_is_shown_and_passes(lab: &Lab, late: &Pushed) -> Result<()> {
    let service = format!("{MEMBER}/basic");
    let before = containers(lab)?;
    lab.request(&Request::Stop(service.clone()))?;
    lab.client.apply(&of_image("late", &late.name))?;
    let first = wait_for_waiting(lab, "late", &["ErrImagePull", "ImagePullBackOff"])?;
    let host = format!("{ADDRESS}:{BASIC_PORT}: ");
    ensure!(first.message.contains(&host), "{first:?}");
    let then = wait_for_waiting(lab, "late", &["ImagePullBackOff"])?;
    ensure!(then.message.contains(&late.name), "{then:?}");
    lab.wait("an event tells of the failure", LONG, || {
        let events: Vec<Event> = lab.client.list("default", "")?;
        let tells = |event: &Event| event.reason == "Failed" && event.message.contains(&late.name);
        Ok(events.iter().any(tells).then_some(()))
    })?;
    // A node that has an image asks nobody.
    lab.client
        .apply(&replicas("app", 8, &format!("{ADDRESS}:{BASIC_PORT}/team/app:1")))?;
    lab.wait_for_pods("app=app", 8)?;
    lab.request(&Request::Start(service))?;
    let pod = lab.wait("the registry is back, and the pod runs", LONG, || {
        let pod = lab.client.get::<Pod>("default", "late")?;
        Ok(pod.filter(orlop_tests::lab::pod_is_ready))
    })?;
    ensure!(image_id(&pod).contains(&late.id), "{}", image_id(&pod));
    let restarts: u32 = statuses(&pod).map(|status| status.1).sum();
    ensure!(restarts == 0, "a container that never was cannot restart: {restarts}");
    ensure!(blobs_given(lab, "basic", &late.layer)?.len() == 1, "one pull");
    let now = containers(lab)?;
    ensure!(before.is_subset(&now), "a pod was restarted: {before:?}, now {now:?}");
    Ok(())
}

/// A ReplicaSet of web servers.
fn replicas(name: &str, count: u32, image: &str) -> String {
    format!(
        "apiVersion: apps/v1\nkind: ReplicaSet\nmetadata: {{name: {name}, namespace: default}}\n\
         spec:\n  replicas: {count}\n  selector: {{matchLabels: {{app: {name}}}}}\n  template:\n\
         \x20   metadata: {{labels: {{app: {name}}}}}\n    spec:\n      containers:\n\
         \x20     - {{name: web, image: \"{image}\", args: [web, \"8080\"]}}\n"
    )
}

fn of_image(name: &str, image: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: default}}\n\
         spec:\n  terminationGracePeriodSeconds: 1\n  containers:\n  - {{name: main, image: \"{image}\", args: [sleep]}}\n"
    )
}

fn node(pod: &Pod) -> &str {
    pod.spec.as_ref().map_or("", |spec| &spec.node_name)
}

/// (container id, restarts) of a pod.
fn statuses(pod: &Pod) -> impl Iterator<Item = (String, u32)> + '_ {
    let statuses = pod.status.iter().flat_map(|status| &status.container_statuses);
    statuses.map(|status| {
        let restarts = u32::try_from(status.restart_count).unwrap_or(u32::MAX);
        (status.container_id.clone(), restarts)
    })
}

/// All containers that run.
fn containers(lab: &Lab) -> Result<BTreeSet<(String, u32)>> {
    let pods: Vec<Pod> = lab.client.list("default", "")?;
    let all = pods.iter().flat_map(statuses);
    Ok(all.filter(|(id, _)| !id.is_empty()).collect())
}

fn image_id(pod: &Pod) -> &str {
    let statuses = pod.status.as_ref().map(|status| &status.container_statuses);
    let first = statuses.and_then(|statuses| statuses.first());
    first.map_or("", |status| &status.image_id)
}

/// Waits until a pod's container waits for one of these reasons.
fn wait_for_waiting(lab: &Lab, name: &str, reasons: &[&str]) -> Result<ContainerStateWaiting> {
    lab.wait(&format!("{name} shows one of {reasons:?}"), LONG, || {
        let pod: Pod = lab.client.get("default", name)?.context("a pod")?;
        let statuses = pod.status.unwrap_or_default().container_statuses;
        let state = statuses.into_iter().next().and_then(|status| status.state);
        let state = state.unwrap_or_default();
        if state.running.is_some() {
            bail!("it runs");
        }
        Ok(state
            .waiting
            .filter(|waiting| reasons.contains(&waiting.reason.as_str())))
    })
}

fn log(lab: &Lab, service: &str) -> Result<String> {
    let path = lab.spec.directory.join(format!("logs/{MEMBER}-{service}.log"));
    fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
}

/// Who was given a blob, once for each time.
fn blobs_given(lab: &Lab, service: &str, digest: &str) -> Result<Vec<String>> {
    let wanted = format!("/blobs/{digest} HTTP");
    let log = log(lab, service)?;
    let given = log
        .lines()
        .filter(|line| line.contains("\"GET /v2/") && line.contains(&wanted) && line.contains("\" 200 "));
    Ok(given
        .map(|line| line.split(' ').next().unwrap_or_default().to_owned())
        .collect())
}
