use tokio::io::AsyncReadExt as _;

use super::*;
use crate::runtime::image_source::{CONFIG, LAYER, MANIFEST, Manifest, digest_of};

fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

fn oci_archive(name: &str) -> (Vec<u8>, String) {
    let layer = tar_of(&[("hello", b"world")]);
    let config = serde_json::json!({"architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [digest_of(&layer)]}})
    .to_string();
    let manifest = serde_json::json!({"schemaVersion": 2, "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "digest": digest_of(config.as_bytes()), "size": config.len()},
        "layers": [{"mediaType": LAYER, "digest": digest_of(&layer), "size": layer.len()}]})
    .to_string();
    let digest = digest_of(manifest.as_bytes());
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [{"mediaType": MANIFEST, "digest": digest,
        "size": manifest.len(), "annotations": {"org.opencontainers.image.ref.name": name}}]})
    .to_string();
    let blob = |digest: String| format!("blobs/sha256/{}", &digest[7..]);
    let archive = tar_of(&[
        ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#),
        ("index.json", index.as_bytes()),
        (&blob(digest_of(manifest.as_bytes())), manifest.as_bytes()),
        (&blob(digest_of(config.as_bytes())), config.as_bytes()),
        (&blob(digest_of(&layer)), &layer),
    ]);
    (archive, digest)
}

fn docker_archive(tag: &str) -> Vec<u8> {
    let layer = tar_of(&[("hello", b"world")]);
    let config = serde_json::json!({"architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [digest_of(&layer)]}})
    .to_string();
    let manifest = serde_json::json!([{"Config": "c.json", "RepoTags": [tag], "Layers": ["l1/layer.tar"]}]).to_string();
    tar_of(&[
        ("l1/layer.tar", &layer),
        ("c.json", config.as_bytes()),
        ("manifest.json", manifest.as_bytes()),
    ])
}

async fn find(dir: &Path, name: &str) -> Result<Option<FoundImage>, RuntimeError> {
    Archives::new(vec![dir.to_owned()])
        .find(&Reference::parse(name).unwrap())
        .await
}

#[tokio::test]
async fn both_formats_are_found_by_normalised_name_and_their_blobs_have_their_digests() {
    let dir = tempfile::tempdir().unwrap();
    let (oci, digest) = oci_archive("docker.io/library/web:v1");
    fs::write(dir.path().join("a.tar"), oci).unwrap();
    fs::write(dir.path().join("b.tar"), docker_archive("app:v2")).unwrap();
    fs::write(dir.path().join("c.tar"), b"garbage that is no archive").unwrap();
    for name in ["web:v1", "app:v2", &format!("web@{digest}")] {
        let image = find(dir.path(), name)
            .await
            .unwrap()
            .unwrap_or_else(|| panic!("{name} is missing"));
        let manifest: Manifest = serde_json::from_slice(&image.manifest).unwrap();
        for blob in manifest.layers.iter().chain([&manifest.config]) {
            let mut bytes = Vec::new();
            image
                .blobs
                .open(&blob.digest)
                .await
                .unwrap()
                .read_to_end(&mut bytes)
                .await
                .unwrap();
            assert_eq!(digest_of(&bytes), blob.digest);
            assert_eq!(bytes.len() as u64, blob.size);
        }
    }
    assert!(find(dir.path(), "web:v2").await.unwrap().is_none());
    assert!(find(dir.path(), "other/web:v1").await.unwrap().is_none());
}

#[tokio::test]
async fn an_archive_that_changes_is_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let archives = Archives::new(vec![dir.path().to_owned()]);
    let reference = Reference::parse("app:v1").unwrap();
    let path = dir.path().join("app.tar");
    fs::write(&path, docker_archive("other:v1")).unwrap();
    assert!(archives.find(&reference).await.unwrap().is_none());
    fs::write(&path, docker_archive("app:v1")).unwrap();
    fs::File::open(&path)
        .unwrap()
        .set_modified(SystemTime::UNIX_EPOCH)
        .unwrap();
    assert!(archives.find(&reference).await.unwrap().is_some());
}

#[tokio::test]
async fn hostile_archives_are_errors() {
    let missing = serde_json::json!([{"Config": "../../etc/passwd", "RepoTags": ["x:1"], "Layers": []}]).to_string();
    let wrong_digest = serde_json::json!({"manifests": [{"mediaType": MANIFEST, "digest": "sha256:../../../etc",
        "size": 1, "annotations": {"org.opencontainers.image.ref.name": "x:1"}}]})
    .to_string();
    let layers: Vec<&str> = vec!["c.json"; 200];
    let many = serde_json::json!([{"Config": "c.json", "RepoTags": ["x:1"], "Layers": layers}]).to_string();
    let absent = format!("sha256:{}", "0".repeat(64));
    let other_bytes = serde_json::json!({"manifests": [{"mediaType": MANIFEST, "digest": absent, "size": 2,
        "annotations": {"org.opencontainers.image.ref.name": "x:1"}}]})
    .to_string();
    let blob = format!("blobs/sha256/{}", "0".repeat(64));
    for files in [
        vec![("manifest.json", missing.as_bytes())],
        vec![("index.json", wrong_digest.as_bytes())],
        vec![("c.json", b"{}".as_slice()), ("manifest.json", many.as_bytes())],
        vec![("index.json", other_bytes.as_bytes()), (&blob, b"{}".as_slice())],
    ] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("x.tar"), tar_of(&files)).unwrap();
        assert!(matches!(
            find(dir.path(), "x:1").await,
            Err(RuntimeError::BadImage { .. })
        ));
    }
}

#[test]
fn too_many_layers_are_refused_before_any_is_read() {
    let layers: Vec<&str> = vec!["not-there"; 200];
    let manifest = serde_json::json!([{"Config": "c.json", "RepoTags": ["x:1"], "Layers": layers}]).to_string();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.tar");
    fs::write(&path, tar_of(&[("manifest.json", manifest.as_bytes())])).unwrap();
    let archive = Archive::read(&path).unwrap();
    let error = archive.found(&archive.images[0]).err().expect("refused").to_string();
    assert!(error.contains("200 layers"), "{error}");
}

#[test]
fn indexes_of_indexes_end() {
    let digest = format!("sha256:{}", "1".repeat(64));
    let index = serde_json::json!({"manifests": [{"mediaType": "application/vnd.oci.image.index.v1+json",
        "digest": digest, "size": 1}]})
    .to_string();
    let blob = format!("blobs/sha256/{}", "1".repeat(64));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.tar");
    fs::write(
        &path,
        tar_of(&[("index.json", index.as_bytes()), (&blob, index.as_bytes())]),
    )
    .unwrap();
    assert!(matches!(Archive::read(&path), Err(ArchiveError::Format(_))));
}

#[test]
fn an_index_that_names_itself_many_times_ends() {
    let one = serde_json::json!({"mediaType": "application/vnd.oci.image.index.v1+json",
        "digest": format!("sha256:{}", "1".repeat(64)), "size": 1});
    let blob = format!("blobs/sha256/{}", "1".repeat(64));
    let image = serde_json::json!({"mediaType": MANIFEST, "digest": format!("sha256:{}", "2".repeat(64)), "size": 1});
    // Read as it asks for, these would be 10^16 indexes, and a million images.
    let itself = serde_json::json!({"manifests": vec![one.clone(); 10_000]}).to_string();
    let indexes = serde_json::json!({"manifests": vec![one; 200]}).to_string();
    let images = serde_json::json!({"manifests": vec![image; 5_000]}).to_string();
    for (index, inner) in [(&itself, &itself), (&indexes, &images)] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.tar");
        fs::write(
            &path,
            tar_of(&[("index.json", index.as_bytes()), (&blob, inner.as_bytes())]),
        )
        .unwrap();
        assert!(matches!(Archive::read(&path), Err(ArchiveError::Format(_))));
    }
}
