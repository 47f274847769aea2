//! The API as operators use it: grpcurl with the admin's certificate, over TLS, on 127.0.0.1.

use std::{
    io::Write,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use orlop_tests::lab::{Lab, Options, repository};
use serde_json::{Value, json};

/// grpcurl with an identity.
struct Grpcurl<'a> {
    lab: &'a Lab,
    certificate: bool,
}

fn grpcurl_path() -> PathBuf {
    let own = repository().join(".orlop/tools/bin/grpcurl");
    if own.is_file() { own } else { PathBuf::from("grpcurl") }
}

impl Grpcurl<'_> {
    /// Runs grpcurl; `Err` has what it printed.
    fn run(&self, before: &[&str], after: &[&str], input: &str) -> Result<String> {
        let pki = self.lab.spec.member_directory("control").join("data/pki");
        let mut command = Command::new(grpcurl_path());
        command.arg("-cacert").arg(pki.join("ca.crt"));
        if self.certificate {
            command
                .arg("-cert")
                .arg(pki.join("admin.crt"))
                .arg("-key")
                .arg(pki.join("admin.key"));
        }
        command
            .args(before)
            .arg(format!("127.0.0.1:{}", self.lab.members.api_port))
            .args(after);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .context("running grpcurl: cargo xtask setup installs it")?;
        child.stdin.take().context("a stdin")?.write_all(input.as_bytes())?;
        let output = child.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            bail!("{text}{}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(text)
    }

    fn call(&self, method: &str, request: &Value) -> Result<Value> {
        let text = self.run(&["-d", "@"], &[method], &request.to_string())?;
        serde_json::from_str(&text).with_context(|| format!("{method} printed {text}"))
    }

    fn objects(&self, verb: &str, request: &Value) -> Result<Value> {
        self.call(&format!("orlop.api.v1.Objects/{verb}"), request)
    }
}

#[test]
fn grpcurl_lists_describes_and_drives_every_verb() -> Result<()> {
    let lab = Lab::start(
        "api",
        &Options {
            nodes: 1,
            ..Options::default()
        },
    )?;
    let admin = Grpcurl {
        lab: &lab,
        certificate: true,
    };
    let services = admin.run(&[], &["list"], "")?;
    for service in [
        "orlop.api.v1.Objects",
        "orlop.node.v1.NodeLink",
        "orlop.cluster.v1.Join",
        "orlop.metrics.v1.Metrics",
    ] {
        ensure!(services.contains(service), "{service} is not in {services}");
    }
    ensure!(
        admin
            .run(&[], &["describe", "orlop.core.v1.ServiceSpec"], "")?
            .contains("cluster_ip"),
        "describe shows fields"
    );
    let health = admin.call("grpc.health.v1.Health/Check", &json!({}))?;
    ensure!(health["status"] == "SERVING", "{health}");
    every_verb(&admin)?;
    errors_have_codes_and_paths(&admin)?;
    identities(&lab)?;
    lab.finish()
}

fn every_verb(admin: &Grpcurl) -> Result<()> {
    let service = json!({"object": {"service": {
        "metadata": {"name": "shop", "namespace": "default", "labels": {"tier": "front"}},
        "spec": {"ports": [{"port": 80}]},
    }}});
    let created = admin.objects("Create", &service)?;
    let spec = &created["service"]["spec"];
    ensure!(
        spec["clusterIP"]
            .as_str()
            .is_some_and(|address| address.starts_with("10.")),
        "{created}"
    );
    ensure!(
        spec["type"] == "ClusterIP" && spec["ports"][0]["protocol"] == "TCP",
        "defaults: {created}"
    );
    let name = json!({"resource": "services", "namespace": "default", "name": "shop"});
    let got = admin.objects("Get", &name)?;
    ensure!(got == created, "Get gives what Create gave");
    let listed = admin.objects(
        "List",
        &json!({"resource": "services", "labelSelector": "tier in (front, back)"}),
    )?;
    ensure!(
        listed["items"].as_array().is_some_and(|items| items.len() == 1),
        "{listed}"
    );

    let mut changed = got.clone();
    changed["service"]["metadata"]["labels"]["tier"] = json!("back");
    let updated = admin.objects("Update", &json!({"object": changed}))?;
    ensure!(updated["service"]["metadata"]["labels"]["tier"] == "back", "{updated}");
    let stale = admin
        .objects("Update", &json!({"object": changed}))
        .err()
        .context("a stale update was taken")?;
    ensure!(format!("{stale:#}").contains("Aborted"), "{stale:#}");

    let manifest =
        "apiVersion: v1\nkind: Service\nmetadata: {name: shop}\nspec:\n  ports: [{port: 80, targetPort: 8081}]\n";
    let applied = admin.objects("Apply", &json!({"manifest": manifest}))?;
    ensure!(applied["action"] == "configured", "{applied}");
    let again = admin.objects("Apply", &json!({"manifest": manifest}))?;
    ensure!(again["action"] == "unchanged", "{again}");
    let version = |result: &Value| result["object"]["service"]["metadata"]["resourceVersion"].clone();
    ensure!(version(&again) == version(&applied), "applying twice writes nothing");
    ensure!(
        again["object"]["service"]["spec"]["clusterIP"] == spec["clusterIP"],
        "the address survives an Apply"
    );

    let status = json!({"object": {"service": {
        "metadata": {"name": "shop", "namespace": "default"}, "status": {"loadBalancer": {}},
    }}});
    admin.objects("UpdateStatus", &status)?;
    watch(admin, &updated)?;
    patch(admin)?;
    let mut delete = name.clone();
    delete["propagationPolicy"] = json!("Foreground");
    let going = admin.objects("Delete", &delete)?;
    ensure!(
        going["service"]["metadata"]["finalizers"] == json!(["foregroundDeletion"]),
        "{going}"
    );
    let deadline = Instant::now() + Duration::from_secs(30);
    while admin.objects("Get", &name).is_ok() {
        ensure!(
            Instant::now() < deadline,
            "a service that waits for its slices never goes"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    let gone = admin.objects("Get", &name).err().context("it is still there")?;
    ensure!(format!("{gone:#}").contains("NotFound"), "{gone:#}");
    Ok(())
}

fn patch(admin: &Grpcurl) -> Result<()> {
    let patch = |kind: &str, patch: &Value| {
        let mut request = json!({"resource": "services", "namespace": "default", "name": "shop"});
        request[kind] = json!(patch.to_string());
        admin.objects("Patch", &request)
    };
    let merge = json!({"metadata": {"labels": {"tier": null, "patched": "merge"}}});
    let merged = patch("merge", &merge)?;
    ensure!(
        merged["service"]["metadata"]["labels"] == json!({"patched": "merge"}),
        "{merged}"
    );
    ensure!(patch("merge", &merge)? == merged, "the same again writes nothing");
    let operations = json!([
        {"op": "test", "path": "/metadata/labels/patched", "value": "merge"},
        {"op": "replace", "path": "/metadata/labels/patched", "value": "json"},
    ]);
    let patched = patch("json", &operations)?;
    ensure!(
        patched["service"]["metadata"]["labels"] == json!({"patched": "json"}),
        "{patched}"
    );
    for (kind, wrong, expected) in [
        ("json", operations, "FailedPrecondition"),
        ("merge", json!({"metadata": {"resourceVersion": "1"}}), "Aborted"),
        ("merge", json!({"spec": {"colour": "red"}}), "spec.colour"),
    ] {
        let refused = patch(kind, &wrong).err().context("a wrong patch was taken")?;
        ensure!(format!("{refused:#}").contains(expected), "{expected}: {refused:#}");
    }
    Ok(())
}

/// A watch after a revision gives what happened since, in order.
fn watch(admin: &Grpcurl, after: &Value) -> Result<()> {
    let revision = &after["service"]["metadata"]["resourceVersion"];
    let request = json!({"resource": "services", "namespace": "default", "resourceVersion": revision}).to_string();
    // grpcurl ends the stream after its time limit, with an error that is no concern here.
    let arguments = ["-max-time", "2", "-d", request.as_str()];
    let printed = match admin.run(&arguments, &["orlop.api.v1.Objects/Watch"], "") {
        Ok(text) => text,
        Err(error) => format!("{error:#}"),
    };
    ensure!(
        printed.contains("\"MODIFIED\"") && printed.contains("\"targetPort\": 8081"),
        "the watch gave {printed}"
    );
    Ok(())
}

fn errors_have_codes_and_paths(admin: &Grpcurl) -> Result<()> {
    let manifest = "apiVersion: v1\nkind: Pod\nmetadata: {name: bad}\nspec:\n  hostPID: true\n  containers:\n  \
                    - {name: main, image: x, livenessProbe: {}}\n---\napiVersion: v1\nkind: Service\n\
                    metadata: {name: worse}\nspec: {ports: [{port: 70000}], typo: 1}\n";
    let refused = admin
        .objects("Apply", &json!({"manifest": manifest}))
        .err()
        .context("a wrong manifest was taken")?;
    let text = format!("{refused:#}");
    ensure!(text.contains("InvalidArgument"), "{text}");
    for path in ["spec.hostPID", "spec.containers[0].livenessProbe", "spec.typo"] {
        ensure!(text.contains(path), "{path} is not named in {text}");
    }
    let nothing = admin
        .objects(
            "Get",
            &json!({"resource": "pods", "namespace": "default", "name": "bad"}),
        )
        .err();
    ensure!(nothing.is_some(), "a part of a refused manifest was written");
    let invalid = json!({"object": {"service": {"metadata": {"name": "x"}, "spec": {"ports": [
        {"port": 70000, "name": "a"}, {"port": 80, "name": "B!"}]}}}});
    let text = format!(
        "{:#}",
        admin
            .objects("Create", &invalid)
            .err()
            .context("a wrong service was taken")?
    );
    ensure!(
        text.contains("spec.ports[0].port") && text.contains("spec.ports[1].name"),
        "{text}"
    );
    let outside = json!({"object": {"service": {"metadata": {"name": "x"}, "spec": {
        "clusterIP": "192.0.2.1", "ports": [{"port": 80}]}}}});
    let text = format!(
        "{:#}",
        admin
            .objects("Create", &outside)
            .err()
            .context("an address out of range was taken")?
    );
    ensure!(text.contains("spec.clusterIP"), "{text}");
    Ok(())
}

fn identities(lab: &Lab) -> Result<()> {
    let nobody = Grpcurl {
        lab,
        certificate: false,
    };
    let refused = nobody
        .objects("List", &json!({"resource": "pods"}))
        .err()
        .context("a stranger may list pods")?;
    ensure!(format!("{refused:#}").contains("Unauthenticated"), "{refused:#}");
    let plain = Command::new(grpcurl_path())
        .args([
            "-plaintext",
            "-connect-timeout",
            "2",
            &format!("127.0.0.1:{}", lab.members.api_port),
            "list",
        ])
        .output()?;
    ensure!(!plain.status.success(), "plaintext is served");
    Ok(())
}

#[test]
fn ten_thousand_objects_pass_in_one_manifest() -> Result<()> {
    let lab = Lab::start(
        "manifest",
        &Options {
            nodes: 1,
            ..Options::default()
        },
    )?;
    let documents: Vec<String> = (0..10_000)
        .map(|index| {
            format!("apiVersion: v1\nkind: Service\nmetadata: {{name: s{index}}}\nspec: {{ports: [{{port: 80}}]}}\n")
        })
        .collect();
    let results = lab
        .client
        .apply_slowly(&documents.join("---\n"), Duration::from_secs(300))?;
    ensure!(results.len() == 10_000 && results.iter().all(|result| result.action == "created"));
    let listed = lab.client.list::<orlop_proto::core::v1::Service>("default", "")?;
    ensure!(
        listed
            .iter()
            .filter(|service| service.metadata.as_ref().is_some_and(|meta| meta.name.starts_with('s')))
            .count()
            == 10_000
    );
    lab.finish()
}
