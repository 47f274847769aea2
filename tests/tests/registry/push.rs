//! Pushing images to the lab's registries, from inside their network.

use std::fs;

use anyhow::{Context, Result};
use oci_client::{
    Client, Reference, RegistryOperation,
    client::{Certificate, CertificateEncoding, ClientConfig},
    secrets::RegistryAuth,
};
use orlop_node::runtime::image_source::{CONFIG, LAYER, MANIFEST, digest_of};
use orlop_tests::{
    images,
    lab::Lab,
    namespaces::in_network,
    registry::{ADDRESS, MEMBER, PASSWORD, USER, file},
};
use serde_json::{Value, json};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// A platform that this machine is not.
pub const FOREIGN: &str = "s390x";

/// An image as a registry has it.
#[derive(Debug, Clone)]
pub struct Pushed {
    /// `HOST:PORT/REPOSITORY:TAG`.
    pub name: String,
    /// The digest of its manifest, or of its index.
    pub digest: String,
    /// The digest of the configuration for this machine: the image's id.
    pub id: String,
    /// The layer that no other image has.
    pub layer: String,
    /// The configurations for other platforms.
    pub foreign: Vec<String>,
}

struct Image {
    manifest: Vec<u8>,
    /// Configuration and layers, by their digests.
    blobs: Vec<(String, Vec<u8>)>,
}

impl Image {
    /// The fixture, and a layer that is this image's own.
    fn new(lab: &Lab, architecture: &str, own: &str) -> Result<Self> {
        let program = fs::read(lab.spec.static_binaries.join("orlop-fixture")).context("reading the fixture")?;
        let layers = [
            images::layer(&[("fixture", &program)])?,
            images::layer(&[("own", own.as_bytes())])?,
        ];
        let diff_ids: Vec<String> = layers.iter().map(|layer| digest_of(layer)).collect();
        let config = json!({
            "architecture": architecture, "os": "linux", "author": own,
            "config": {"Entrypoint": ["/fixture"], "Cmd": ["web", "8080"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let described = |media_type: &str, blob: &[u8]| json!({"mediaType": media_type, "digest": digest_of(blob), "size": blob.len()});
        let config = config.to_string().into_bytes();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": described(CONFIG, &config),
            "layers": layers.iter().map(|layer| described(LAYER, layer)).collect::<Vec<_>>(),
        });
        let blobs = [config].into_iter().chain(layers);
        Ok(Self {
            manifest: manifest.to_string().into_bytes(),
            blobs: blobs.map(|blob| (digest_of(&blob), blob)).collect(),
        })
    }

    fn described(&self, architecture: &str) -> Value {
        json!({
            "mediaType": MANIFEST, "digest": digest_of(&self.manifest), "size": self.manifest.len(),
            "platform": {"architecture": architecture, "os": "linux"},
        })
    }

    async fn push(self, client: &Client, tag: &str) -> Result<()> {
        let reference: Reference = tag.parse()?;
        let auth = RegistryAuth::Basic(USER.to_owned(), PASSWORD.to_owned());
        client.auth(&reference, &auth, RegistryOperation::Push).await?;
        for (digest, blob) in self.blobs {
            client.push_blob(&reference, blob, &digest).await?;
        }
        let kind = MANIFEST.parse().context("a media type")?;
        client.push_manifest_raw(&reference, self.manifest, kind).await?;
        Ok(())
    }
}

/// Pushes an image for two platforms, this machine's and another, as `REPOSITORY:1`. Each repository's has a layer of its own.
pub fn push(lab: &Lab, port: u16, repository: &str) -> Result<Pushed> {
    let ours = if cfg!(target_arch = "aarch64") {
        "arm64"
    } else {
        "amd64"
    };
    let host = format!("{ADDRESS}:{port}");
    let name = format!("{host}/{repository}:1");
    let own = Image::new(lab, ours, &format!("of {name}"))?;
    let foreign = Image::new(lab, FOREIGN, &format!("of {name}, for others"))?;
    let manifests = [foreign.described(FOREIGN), own.described(ours)];
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}).to_string();
    let pushed = Pushed {
        name: name.clone(),
        digest: digest_of(index.as_bytes()),
        id: own.blobs[0].0.clone(),
        layer: own.blobs[2].0.clone(),
        foreign: vec![foreign.blobs[0].0.clone(), foreign.blobs[2].0.clone()],
    };
    let config = ClientConfig {
        tls_certs_only: vec![Certificate {
            encoding: CertificateEncoding::Pem,
            data: fs::read(file(&lab.spec, "ca.pem")).context("reading the CA")?,
        }],
        ..ClientConfig::default()
    };
    let tags =
        [(ours, own), (FOREIGN, foreign)].map(|(platform, image)| (format!("{host}/{repository}:{platform}"), image));
    in_network(lab.members.get(MEMBER)?.pid, move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async move {
            let client = Client::try_from(config)?;
            for (tag, image) in tags {
                image
                    .push(&client, &tag)
                    .await
                    .with_context(|| format!("pushing {tag}"))?;
            }
            let reference: Reference = name.parse()?;
            let kind = INDEX.parse().context("a media type")?;
            let pushing = client.push_manifest_raw(&reference, index.into_bytes(), kind);
            pushing.await.with_context(|| format!("pushing {name}")).map(drop)
        })
    })?;
    Ok(pushed)
}
