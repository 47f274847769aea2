//! The CA and the certificates that it signs.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::{
    CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject,
};
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate, X509CertificationRequest};

use super::{KeyHash, PkiError, files};
use crate::{
    config::PkiConfig,
    server::identity::{MASTERS, NODE_PREFIX, NODES},
};

/// How long the CA is good.
const CA_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Certificates begin a little in the past: clocks differ.
const BACKDATE: Duration = Duration::from_secs(300);
/// No certificate request is larger.
const MAX_REQUEST: usize = 16 << 10;

/// The CA. Signs; keeps its own files in one directory.
pub struct Authority {
    directory: PathBuf,
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    lives: PkiConfig,
}

/// A certificate that was made for somebody else's key.
#[derive(Debug, Clone)]
pub struct Issued {
    /// DER.
    pub certificate: CertificateDer<'static>,
    /// When it ends.
    pub not_after: SystemTime,
    /// Of the key inside.
    pub key: KeyHash,
}

/// What the TLS listeners show.
pub struct ServerIdentity {
    /// The server's certificate and the CA's, so that a joining machine can compare the latter with its token.
    pub chain: Vec<CertificateDer<'static>>,
    /// The server's key.
    pub key: PrivateKeyDer<'static>,
    /// When it ends.
    pub not_after: SystemTime,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Authority")
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}

impl Authority {
    /// Loads the CA from a directory, or makes one where there is none.
    ///
    /// # Errors
    /// When the files cannot be read or written, are damaged, or the key is missing: then nothing is made anew, since every
    /// node trusts the old one.
    pub fn open(directory: &Path, lives: &PkiConfig) -> Result<Self, PkiError> {
        files::private_dir(directory)?;
        let certificate_path = directory.join("ca.crt");
        let key_path = directory.join("ca.key");
        let (certificate, key) = match (files::read(&certificate_path)?, files::read(&key_path)?) {
            (Some(certificate), Some(key)) => (certificate, key),
            (None, key) => {
                // The key is written first. A key without a certificate is kept: a certificate of the same name and key
                // is good for everybody who trusted the one that was lost.
                let pair = match &key {
                    Some(pem) => KeyPair::from_pem(pem).map_err(|error| PkiError::Damaged {
                        path: key_path.clone(),
                        reason: error.to_string(),
                    })?,
                    None => KeyPair::generate()?,
                };
                let certificate = make_ca(&pair)?;
                if key.is_none() {
                    files::write(&key_path, &pair.serialize_pem(), files::PRIVATE)?;
                }
                files::write(&certificate_path, &certificate, files::PUBLIC)?;
                tracing::info!(directory = %directory.display(), "made a certificate authority");
                (certificate, pair.serialize_pem())
            }
            (Some(_), None) => {
                let reason = "is missing, and ca.crt is there".to_owned();
                return Err(PkiError::Damaged { path: key_path, reason });
            }
        };
        let damaged = |path: &Path, error: &dyn std::fmt::Display| PkiError::Damaged {
            path: path.to_owned(),
            reason: error.to_string(),
        };
        let key = KeyPair::from_pem(&key).map_err(|error| damaged(&key_path, &error))?;
        let certificate = CertificateDer::from_pem_slice(certificate.as_bytes())
            .map_err(|error| damaged(&certificate_path, &error))?;
        let (_, parsed) =
            X509Certificate::from_der(&certificate).map_err(|error| damaged(&certificate_path, &error))?;
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err(damaged(&key_path, &"is not the key of ca.crt"));
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(|error| damaged(&certificate_path, &error))?;
        Ok(Self {
            directory: directory.to_owned(),
            issuer,
            certificate,
            lives: lives.clone(),
        })
    }

    /// Whether a directory has a CA, or a part of one.
    pub fn is_in(directory: &Path) -> bool {
        ["ca.crt", "ca.key"].iter().any(|file| directory.join(file).exists())
    }

    /// The CA's certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// SHA-256 of the CA's certificate in hex: the last part of a join token.
    pub fn hash(&self) -> String {
        hex::encode(Sha256::digest(&self.certificate))
    }

    /// The server's certificate and key, made anew when they are near their end, are not of this CA, or are for other
    /// names.
    ///
    /// # Errors
    /// When files cannot be read or written.
    pub fn server(&self, names: &[String]) -> Result<ServerIdentity, PkiError> {
        let mut wanted = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
        wanted.extend(names.iter().cloned());
        wanted.sort_unstable();
        wanted.dedup();
        let (certificate, key, not_after) = self.own(
            "server",
            |certificate| alternative_names(certificate) == wanted,
            || {
                let mut params = self.leaf("orlop-control", None, ExtendedKeyUsagePurpose::ServerAuth)?;
                for name in &wanted {
                    params.subject_alt_names.push(match name.parse::<IpAddr>() {
                        Ok(address) => SanType::IpAddress(address),
                        Err(_) => SanType::DnsName(name.as_str().try_into()?),
                    });
                }
                Ok(params)
            },
        )?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok(ServerIdentity {
            chain: vec![certificate, self.certificate.clone()],
            key,
            not_after,
        })
    }

    /// Makes sure that `admin.crt` and `admin.key` are there and good.
    ///
    /// # Errors
    /// When files cannot be read or written.
    pub fn admin(&self) -> Result<(), PkiError> {
        self.own(
            "admin",
            |_| true,
            || self.leaf("orlop-admin", Some(MASTERS), ExtendedKeyUsagePurpose::ClientAuth),
        )?;
        Ok(())
    }

    /// The certificate and key by which this replica asks the others, as an administrator; made anew when they are near their end.
    ///
    /// # Errors
    /// When files cannot be read or written.
    pub fn replica(&self) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), PkiError> {
        let (certificate, key, _) = self.own(
            "replica",
            |_| true,
            || self.leaf("orlop-control", Some(MASTERS), ExtendedKeyUsagePurpose::ClientAuth),
        )?;
        Ok((certificate, PrivatePkcs8KeyDer::from(key.serialize_der()).into()))
    }

    /// Signs a node's certificate request. Its subject and extensions are ignored.
    ///
    /// # Errors
    /// [`PkiError::Request`] when the request is damaged, its signature is wrong, or its key is of a kind that we do not take.
    pub fn sign_node(&self, node: &str, request: &[u8]) -> Result<Issued, PkiError> {
        let (public_key, key) = read_request(request)?;
        let life = self.lives.node_certificate;
        let mut params = self.leaf(
            &format!("{NODE_PREFIX}{node}"),
            Some(NODES),
            ExtendedKeyUsagePurpose::ClientAuth,
        )?;
        let not_after = seconds(SystemTime::now() + life);
        params.not_after = not_after.into();
        let certificate = params.signed_by(&public_key, &self.issuer)?;
        Ok(Issued {
            certificate: certificate.into(),
            not_after,
            key,
        })
    }

    /// The key hash of a certificate request, when the request is one that we would sign.
    ///
    /// # Errors
    /// As [`Authority::sign_node`].
    pub fn request_key(request: &[u8]) -> Result<KeyHash, PkiError> {
        Ok(read_request(request)?.1)
    }

    /// `NAME.crt` and `NAME.key`, made anew unless they are good.
    fn own(
        &self,
        name: &str,
        fits: impl Fn(&X509Certificate<'_>) -> bool,
        params: impl Fn() -> Result<CertificateParams, PkiError>,
    ) -> Result<(CertificateDer<'static>, KeyPair, SystemTime), PkiError> {
        let certificate_path = self.directory.join(format!("{name}.crt"));
        let key_path = self.directory.join(format!("{name}.key"));
        if let (Some(certificate), Some(key)) = (files::read(&certificate_path)?, files::read(&key_path)?)
            && let Some(good) = self.still_good(&certificate, &key, &fits)
        {
            return Ok(good);
        }
        let key = KeyPair::generate()?;
        let params = params()?;
        let not_after = params.not_after.into();
        let certificate = params.signed_by(&key, &self.issuer)?;
        // A crash between the two leaves a pair that does not fit, which the next start makes anew.
        files::write(&key_path, &key.serialize_pem(), files::PRIVATE)?;
        files::write(&certificate_path, &certificate.pem(), files::PUBLIC)?;
        tracing::info!(certificate = %certificate_path.display(), "made a certificate");
        Ok((certificate.into(), key, not_after))
    }

    fn still_good(
        &self,
        certificate: &str,
        key: &str,
        fits: impl Fn(&X509Certificate<'_>) -> bool,
    ) -> Option<(CertificateDer<'static>, KeyPair, SystemTime)> {
        let key = KeyPair::from_pem(key).ok()?;
        let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).ok()?;
        let (_, parsed) = X509Certificate::from_der(&certificate).ok()?;
        let (_, ca) = X509Certificate::from_der(&self.certificate).ok()?;
        parsed.verify_signature(Some(ca.public_key())).ok()?;
        let not_after = parsed.validity().not_after.timestamp();
        let not_after = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(not_after).ok()?);
        let left = not_after.duration_since(SystemTime::now()).ok()?;
        let good = parsed.public_key().raw == key.subject_public_key_info()
            && left > self.lives.own_certificates / 3
            && fits(&parsed);
        good.then_some((certificate, key, not_after))
    }

    fn leaf(
        &self,
        name: &str,
        group: Option<&str>,
        usage: ExtendedKeyUsagePurpose,
    ) -> Result<CertificateParams, PkiError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        params.use_authority_key_identifier_extension = true;
        params.not_before = (SystemTime::now() - BACKDATE).into();
        params.not_after = seconds(SystemTime::now() + self.lives.own_certificates).into();
        params.serial_number = Some(serial());
        Ok(params)
    }
}

fn make_ca(key: &KeyPair) -> Result<String, PkiError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "orlop-ca");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = (SystemTime::now() - BACKDATE).into();
    params.not_after = (SystemTime::now() + CA_LIFE).into();
    params.serial_number = Some(serial());
    Ok(params.self_signed(key)?.pem())
}

/// The key of a request, in a form that signs, and its hash.
fn read_request(request: &[u8]) -> Result<(rcgen::PublicKey, KeyHash), PkiError> {
    let refused = |reason: &str| PkiError::Request(reason.to_owned());
    if request.len() > MAX_REQUEST {
        return Err(refused("is too large"));
    }
    let (rest, parsed) = X509CertificationRequest::from_der(request).map_err(|_| refused("is not PKCS #10 in DER"))?;
    if !rest.is_empty() {
        return Err(refused("has bytes behind its end"));
    }
    let raw = parsed.certification_request_info.subject_pki.raw;
    let params = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(request))
        .map_err(|error| PkiError::Request(error.to_string()))?;
    // The library takes the key's kind from the signature's; where the two differ it would sign another key.
    if params.public_key.subject_public_key_info() != raw {
        return Err(refused("the key is of a kind that is not taken; use ECDSA P-256"));
    }
    Ok((params.public_key, KeyHash::of(raw)))
}

/// The alternative names of a certificate, sorted.
fn alternative_names(certificate: &X509Certificate<'_>) -> Vec<String> {
    let Ok(Some(extension)) = certificate.subject_alternative_name() else {
        return Vec::new();
    };
    let mut names: Vec<String> = extension
        .value
        .general_names
        .iter()
        .map(|name| match name {
            GeneralName::DNSName(name) => (*name).to_owned(),
            GeneralName::IPAddress(bytes) => match <[u8; 4]>::try_from(*bytes) {
                Ok(v4) => IpAddr::from(v4).to_string(),
                Err(_) => {
                    <[u8; 16]>::try_from(*bytes).map_or_else(|_| "?".to_owned(), |v6| IpAddr::from(v6).to_string())
                }
            },
            other => format!("{other:?}"),
        })
        .collect();
    names.sort_unstable();
    names
}

fn serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    // Positive, and never empty in front.
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

/// Certificates know no fractions of seconds.
fn seconds(time: SystemTime) -> SystemTime {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    SystemTime::UNIX_EPOCH + Duration::from_secs(since.as_secs())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::server::identity::Identity;

    fn request(key: &KeyPair) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::OrganizationName, MASTERS);
        params.serialize_request(key).expect("request").der().to_vec()
    }

    #[test]
    fn everything_is_made_once_and_found_again() {
        let directory = tempfile::tempdir().expect("directory");
        let pki = directory.path().join("pki");
        let lives = PkiConfig::default();
        let first = Authority::open(&pki, &lives).expect("makes");
        let names = vec!["control.example".to_owned(), "192.0.2.7".to_owned()];
        let server = first.server(&names).expect("server");
        first.admin().expect("admin");
        for key in ["ca.key", "server.key", "admin.key"] {
            let mode = std::fs::metadata(pki.join(key)).expect("there").permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{key}");
        }
        let admin = std::fs::read(pki.join("admin.crt")).expect("there");

        let second = Authority::open(&pki, &lives).expect("loads");
        assert_eq!(first.hash(), second.hash());
        assert_eq!(second.server(&names).expect("server").chain, server.chain);
        second.admin().expect("admin");
        assert_eq!(std::fs::read(pki.join("admin.crt")).expect("there"), admin);
        assert_ne!(second.server(&[]).expect("other names").chain[0], server.chain[0]);
        assert_eq!(
            Identity::from_certificate(&CertificateDer::from_pem_slice(&admin).expect("pem")),
            Identity::Admin {
                name: "orlop-admin".into()
            }
        );
    }

    #[test]
    fn a_lost_ca_key_is_not_replaced() {
        let directory = tempfile::tempdir().expect("directory");
        Authority::open(directory.path(), &PkiConfig::default()).expect("makes");
        std::fs::remove_file(directory.path().join("ca.key")).expect("removes");
        let error = Authority::open(directory.path(), &PkiConfig::default()).expect_err("refuses");
        assert!(error.to_string().contains("ca.key"), "{error}");
    }

    #[test]
    fn certificates_near_their_end_are_made_anew() {
        let directory = tempfile::tempdir().expect("directory");
        let short = PkiConfig {
            own_certificates: Duration::from_secs(60),
            ..PkiConfig::default()
        };
        let first = Authority::open(directory.path(), &short)
            .expect("makes")
            .server(&[])
            .expect("server");
        let long = Authority::open(directory.path(), &PkiConfig::default()).expect("loads");
        assert_ne!(long.server(&[]).expect("server").chain[0], first.chain[0]);
    }

    #[test]
    fn a_node_gets_its_own_name_whatever_it_asks_for() {
        let directory = tempfile::tempdir().expect("directory");
        let authority = Authority::open(directory.path(), &PkiConfig::default()).expect("makes");
        let key = KeyPair::generate().expect("key");
        let issued = authority.sign_node("n1", &request(&key)).expect("signs");
        let expected = KeyHash::of(&key.subject_public_key_info());
        assert_eq!(issued.key, expected);
        assert_eq!(
            Identity::from_certificate(&issued.certificate),
            Identity::Node {
                name: "n1".into(),
                key: expected
            }
        );
    }

    #[test]
    fn damaged_requests_are_refused() {
        let directory = tempfile::tempdir().expect("directory");
        let authority = Authority::open(directory.path(), &PkiConfig::default()).expect("makes");
        let good = request(&KeyPair::generate().expect("key"));
        let mut forged = good.clone();
        let last = forged.len() - 1;
        forged[last] ^= 1;
        let mut longer = good.clone();
        longer.push(0);
        for bad in [
            vec![],
            b"garbage".to_vec(),
            good[..good.len() - 1].to_vec(),
            forged,
            longer,
            vec![0; MAX_REQUEST + 1],
        ] {
            assert!(matches!(authority.sign_node("n1", &bad), Err(PkiError::Request(_))));
        }
    }
}
