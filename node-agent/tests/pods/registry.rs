//! Debian's docker-registry in the test's own namespaces, and images for it.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use oci_client::{
    Client, Reference, RegistryOperation,
    client::{ClientConfig, ClientProtocol},
    secrets::RegistryAuth,
};
use orlop_node::runtime::image_source::{
    CONFIG, Descriptor, LAYER, LAYER_GZIP, MANIFEST, Manifest, architecture, digest_of,
};

use super::stage::Stage;

/// `user:sesame`, as `htpasswd -B` writes it.
const HTPASSWD: &str = "user:$2b$04$mLSkxp4h2TXj4I8bvggo0eWpclfcJz.mq90jnZhBq4L6L5NX7HUpi\n";

/// A registry at `127.0.0.1:PORT`. All of one stage have the same images.
pub struct Registry {
    port: u16,
    dir: PathBuf,
    process: Child,
    client: Client,
}

impl Registry {
    /// Starts one, which asks for `user` and `sesame` if it is `guarded`.
    pub async fn start(stage: &Stage, port: u16, guarded: bool) -> Self {
        let dir = stage.dir.join("registry");
        fs::create_dir_all(&dir).unwrap();
        let htpasswd = dir.join("htpasswd");
        fs::write(&htpasswd, HTPASSWD).unwrap();
        let auth = match guarded {
            true => format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", htpasswd.display()),
            false => String::new(),
        };
        let config = dir.join(format!("{port}.yml"));
        let text = format!(
            "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"127.0.0.1:{port}\"}}\n{auth}",
            dir.display()
        );
        fs::write(&config, text).unwrap();
        let log = fs::File::create(dir.join(format!("{port}.log"))).unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("docker-registry is installed (cargo xtask setup)");
        let begin = Instant::now();
        while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err() {
            assert!(
                begin.elapsed() < Duration::from_secs(20),
                "docker-registry does not listen"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let client = Client::try_from(ClientConfig {
            protocol: ClientProtocol::Http,
            ..ClientConfig::default()
        });
        Self {
            port,
            dir,
            process,
            client: client.unwrap(),
        }
    }

    /// An image's name here.
    pub fn name(&self, rest: &str) -> String {
        format!("127.0.0.1:{}/{rest}", self.port)
    }

    /// Pushes a manifest or an index and returns its descriptor.
    pub async fn push_manifest(&self, name: &str, media_type: &str, manifest: Vec<u8>) -> Descriptor {
        let descriptor = described(media_type, &manifest);
        let image: Reference = self.name(name).parse().unwrap();
        let kind = media_type.parse().unwrap();
        self.client.push_manifest_raw(&image, manifest, kind).await.unwrap();
        descriptor
    }

    /// Pushes an image of these layers, for a platform; returns its descriptor and its configuration's digest, which is its id.
    pub async fn push(
        &self,
        name: &str,
        architecture: &str,
        environment: &str,
        layers: &[Vec<u8>],
    ) -> (Descriptor, String) {
        let image: Reference = self.name(name).parse().unwrap();
        let auth = RegistryAuth::Anonymous;
        self.client.auth(&image, &auth, RegistryOperation::Push).await.unwrap();
        let diff_ids: Vec<String> = layers.iter().map(|layer| digest_of(layer)).collect();
        let config = serde_json::json!({
            "architecture": architecture, "os": "linux",
            "config": {"Entrypoint": ["/fixture"], "Cmd": ["sleep"], "Env": [environment]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let mut blobs = vec![(CONFIG, config.to_string().into_bytes())];
        for (at, layer) in layers.iter().enumerate() {
            // The first as it is, the others compressed.
            if at == 0 {
                blobs.push((LAYER, layer.clone()));
                continue;
            }
            blobs.push((LAYER_GZIP, gzip(layer)));
        }
        let mut descriptors = Vec::new();
        for (media_type, blob) in blobs {
            let descriptor = described(media_type, &blob);
            self.client.push_blob(&image, blob, &descriptor.digest).await.unwrap();
            descriptors.push(descriptor);
        }
        let config = descriptors.remove(0);
        let id = config.digest.clone();
        let manifest = Manifest::new(config, descriptors);
        let mut descriptor = self.push_manifest(name, MANIFEST, manifest.to_bytes().to_vec()).await;
        descriptor.platform = Some(orlop_node::runtime::image_source::Platform {
            architecture: architecture.to_owned(),
            os: "linux".to_owned(),
        });
        (descriptor, id)
    }

    /// Pushes an image of these blobs whose configuration says what they unpack to.
    pub async fn push_blobs(&self, name: &str, diff_ids: &[String], blobs: &[(&str, Vec<u8>)]) {
        let image: Reference = self.name(name).parse().unwrap();
        // Each image has a configuration of its own.
        let rootfs = serde_json::json!({"type": "layers", "diff_ids": diff_ids});
        let config = serde_json::json!({"rootfs": rootfs, "author": name})
            .to_string()
            .into_bytes();
        let mut descriptors = Vec::new();
        for (media_type, blob) in [(CONFIG, config)].iter().chain(blobs) {
            let descriptor = described(media_type, blob);
            let pushed = descriptors
                .iter()
                .any(|known: &Descriptor| known.digest == descriptor.digest);
            if !pushed {
                self.client
                    .push_blob(&image, blob.clone(), &descriptor.digest)
                    .await
                    .unwrap();
            }
            descriptors.push(descriptor);
        }
        let config = descriptors.remove(0);
        let manifest = Manifest::new(config, descriptors).to_bytes();
        self.push_manifest(name, MANIFEST, manifest.to_vec()).await;
    }

    /// Puts a manifest under a name's tag `1` where the registry keeps them: it takes no such one itself.
    pub fn plant(&self, name: &str, manifest: &[u8]) {
        let digest = digest_of(manifest);
        let hex = digest.trim_start_matches("sha256:");
        let root = self.dir.join("docker/registry/v2");
        let of_name = root.join("repositories").join(name).join("_manifests");
        for (file, text) in [
            (
                root.join("blobs/sha256").join(&hex[..2]).join(hex).join("data"),
                manifest,
            ),
            (
                of_name.join("revisions/sha256").join(hex).join("link"),
                digest.as_bytes(),
            ),
            (of_name.join("tags/1/current/link"), digest.as_bytes()),
        ] {
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
    }

    /// How often a blob was asked for.
    pub fn asked(&self, digest: &str) -> usize {
        let log = fs::read_to_string(self.dir.join(format!("{}.log", self.port))).unwrap();
        let request = format!("/blobs/{digest} HTTP");
        let gets = log.lines().filter(|line| line.contains("\"GET /v2/"));
        gets.filter(|line| line.contains(&request)).count()
    }

    /// Replaces a blob's bytes with others of the same length.
    pub fn forge(&self, digest: &str) {
        let hex = digest.trim_start_matches("sha256:");
        let blobs = self.dir.join("docker/registry/v2/blobs/sha256");
        let file = blobs.join(&hex[..2]).join(hex).join("data");
        let mut bytes = fs::read(&file).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(file, bytes).unwrap();
    }

    /// Ends it.
    pub fn stop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// A blob as manifests describe it.
pub fn described(media_type: &str, bytes: &[u8]) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest: digest_of(bytes),
        size: bytes.len() as u64,
        platform: None,
        annotations: Default::default(),
    }
}

/// A registry of one image that gives half of its layer only, and leaves its clients waiting for the rest: without another word, or,
/// if it is `dripping`, giving a byte now and then. Counts how often it was asked for the layer.
pub async fn stalling(
    port: u16,
    manifest: bytes::Bytes,
    config: String,
    layer: Vec<u8>,
    dripping: bool,
) -> Arc<AtomicUsize> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    let digest = digest_of(&layer);
    let answers = Arc::new((manifest, config, layer, digest));
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = asked.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (answers, counted) = (answers.clone(), counted.clone());
            tokio::spawn(async move {
                let (manifest, config, layer, digest) = &*answers;
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await.unwrap());
                }
                let head = String::from_utf8(head).unwrap();
                let (body, whole) = match head.contains("/manifests/") {
                    true => (&manifest[..], true),
                    false if head.contains(digest) => (&layer[..], false),
                    false => (config.as_bytes(), true),
                };
                let start = format!(
                    "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                    body.len()
                );
                stream.write_all(start.as_bytes()).await.unwrap();
                let sent = if whole { body.len() } else { body.len() / 2 };
                stream.write_all(&body[..sent]).await.unwrap();
                if whole {
                    return;
                }
                counted.fetch_add(1, Ordering::SeqCst);
                if !dripping {
                    std::future::pending::<()>().await;
                }
                // Until nobody listens any more.
                for byte in &body[sent..] {
                    if stream.write_all(&[*byte]).await.is_err() {
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            });
        }
    });
    asked
}

/// The fixture's program as a layer.
pub fn program(stage: &Stage) -> Vec<u8> {
    layer(&[("fixture", &fs::read(&stage.fixture).unwrap())])
}

/// A layer of files whose names are written as they are, `..` and all; a file without bytes is a link to `/`.
pub fn layer(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_size(bytes.len() as u64);
        header.set_mode(0o755);
        if bytes.is_empty() {
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_link_name("/").unwrap();
        }
        header.set_cksum();
        builder.append(&header, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

/// A layer of half a megabyte that unpacks to a file of 512 MiB.
pub fn zeros() -> Vec<u8> {
    let chunk = vec![0; 8 << 20];
    let mut header = tar::Header::new_ustar();
    header.set_path("zeros").unwrap();
    header.set_size(64 * chunk.len() as u64);
    header.set_mode(0o644);
    header.set_cksum();
    let members = std::iter::repeat_n(gzip(&chunk), 64).flatten();
    // One member after another is one stream.
    gzip(header.as_bytes())
        .into_iter()
        .chain(members)
        .chain(gzip(&[0; 1024]))
        .collect()
}

/// A layer of three kilobytes whose one file has 4 GiB: all of it a hole, as PAX headers say.
pub fn sparse() -> Vec<u8> {
    const SIZE: &str = "4294967296";
    let mut builder = tar::Builder::new(Vec::new());
    let extensions = [
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.minor", "0"),
        ("GNU.sparse.name", "sparse"),
        ("GNU.sparse.realsize", SIZE),
    ];
    let extensions = extensions.map(|(key, value)| (key, value.as_bytes()));
    builder.append_pax_extensions(extensions).unwrap();
    let mut map = format!("1\n{SIZE}\n0\n").into_bytes();
    map.resize(512, 0);
    let mut header = tar::Header::new_ustar();
    header.set_path("sparse").unwrap();
    header.set_size(map.len() as u64);
    header.set_mode(0o644);
    header.set_cksum();
    builder.append(&header, map.as_slice()).unwrap();
    builder.into_inner().unwrap()
}

/// A layer whose one entry is a hard link to a file of this machine.
pub fn hard_link() -> Vec<u8> {
    special(tar::EntryType::Link, |header| {
        header.set_link_name("../../../../../../../../etc/hostname").unwrap();
    })
}

/// A layer with a character device `device`.
pub fn device(major: u32, minor: u32) -> Vec<u8> {
    special(tar::EntryType::Char, |header| {
        header.set_device_major(major).unwrap();
        header.set_device_minor(minor).unwrap();
    })
}

fn special(kind: tar::EntryType, change: impl FnOnce(&mut tar::Header)) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.set_path("device").unwrap();
    header.set_size(0);
    header.set_mode(0o666);
    header.set_entry_type(kind);
    change(&mut header);
    header.set_cksum();
    let mut builder = tar::Builder::new(Vec::new());
    builder.append(&header, std::io::empty()).unwrap();
    builder.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap()
}

/// This machine's platform, and one that it is not.
pub fn platforms() -> (&'static str, &'static str) {
    (architecture(), "s390x")
}
