//! Registries of images in a lab: Debian's docker-registry in a member of its own, over TLS with a CA that the nodes' configuration
//! names. One wants a password, the other a token of a service, which a test runs.

use std::{fs, net::Ipv4Addr, path::PathBuf};

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

use crate::layout::Spec;

/// The member's name, which the logs begin with.
pub const MEMBER: &str = "registry";
/// Its address on the bridge, below control's.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 5);
/// The port of the registry that wants a password.
pub const BASIC_PORT: u16 = 5000;
/// The port of the registry that wants a token.
pub const TOKEN_PORT: u16 = 5001;
/// Where it sends those who have none.
pub const TOKEN_SERVICE_PORT: u16 = 5002;
/// Another name of both registries. Of the first the nodes know nothing by it, of the second everything but the credentials.
pub const OTHER_NAME: &str = "registry.lab";
/// Who may push and pull.
pub const USER: &str = "user";
/// With which password.
pub const PASSWORD: &str = "sesame";
/// Who says that the tokens' holders may, and to whom.
pub const ISSUER: &str = "lab";

/// The two, as `htpasswd -B` writes them.
const HTPASSWD: &str = "user:$2b$04$mLSkxp4h2TXj4I8bvggo0eWpclfcJz.mq90jnZhBq4L6L5NX7HUpi\n";

/// A file of the registries: `ca.pem`; `server` and `token`, each `.pem` and `.key`.
pub fn file(spec: &Spec, name: &str) -> PathBuf {
    spec.member_directory(MEMBER).join(name)
}

/// Makes the CA, the certificates and what docker-registry is told.
pub fn prepare(spec: &Spec) -> Result<()> {
    fs::create_dir_all(spec.member_directory(MEMBER)).context("making the registries' folder")?;
    let write = |name: &str, text: &str| fs::write(file(spec, name), text).with_context(|| format!("writing {name}"));
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.distinguished_name.push(DnType::CommonName, "the lab's registries");
    let ca_key = KeyPair::generate()?;
    write("ca.pem", &ca.self_signed(&ca_key)?.pem())?;
    let issuer = Issuer::new(ca, ca_key);
    let names = [ADDRESS.to_string(), OTHER_NAME.to_owned()];
    for (name, names) in [("server", names.to_vec()), ("token", Vec::new())] {
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(names)?.signed_by(&key, &issuer)?;
        write(&format!("{name}.pem"), &certificate.pem())?;
        write(&format!("{name}.key"), &key.serialize_pem())?;
    }
    write("htpasswd", HTPASSWD)?;
    let path = |name: &str| file(spec, name).display().to_string();
    let basic = format!("htpasswd: {{realm: lab, path: {:?}}}", path("htpasswd"));
    let token = format!(
        "token: {{realm: \"https://{ADDRESS}:{TOKEN_SERVICE_PORT}/token\", service: {ISSUER}, issuer: {ISSUER}, \
         rootcertbundle: {:?}}}",
        path("ca.pem")
    );
    for (name, port, auth) in [("basic", BASIC_PORT, basic), ("token", TOKEN_PORT, token)] {
        let text = format!(
            "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {:?}}}}}\nauth: {{{auth}}}\n\
             http: {{addr: \"{ADDRESS}:{port}\", tls: {{certificate: {:?}, key: {:?}}}}}\n",
            path(&format!("{name}-images")),
            path("server.pem"),
            path("server.key"),
        );
        write(&format!("{name}.yml"), &text)?;
    }
    Ok(())
}

/// The services' names, and what each runs.
pub fn programs(spec: &Spec) -> Vec<(&'static str, Vec<String>)> {
    let program = |name: &'static str| {
        let config = file(spec, &format!("{name}.yml")).display().to_string();
        (name, vec!["docker-registry".to_owned(), "serve".to_owned(), config])
    };
    ["basic", "token"].map(program).to_vec()
}

/// The tables of `node.toml` by which nodes may pull.
pub fn known_to_nodes(spec: &Spec) -> String {
    let ca = format!("ca = {:?}\n", file(spec, "ca.pem"));
    let credentials = format!("username = \"{USER}\"\npassword = \"{PASSWORD}\"\n");
    format!(
        "[registries.\"{ADDRESS}:{BASIC_PORT}\"]\n{ca}{credentials}[registries.\"{ADDRESS}:{TOKEN_PORT}\"]\n{ca}{credentials}\
         [registries.\"{OTHER_NAME}:{TOKEN_PORT}\"]\n{ca}"
    )
}
