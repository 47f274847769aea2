//! One registry over HTTP: requests, authorisation, and bounds on everything that it may answer.

use std::{collections::HashMap, future::Future, net::IpAddr, sync::Arc, time::Duration};

use base64::Engine as _;
use bytes::{Bytes, BytesMut};
use reqwest::{
    Certificate, Client, Response, StatusCode, Url,
    header::{ACCEPT, AUTHORIZATION, HeaderValue, RANGE, WWW_AUTHENTICATE},
    redirect,
};
use serde::Deserialize;
use tokio::sync::{Mutex, Semaphore};

use super::{PullError, RegistrySettings, Secret};

/// How often a request is made before its failure counts.
const ATTEMPTS: u32 = 3;
/// The wait before a request is made again; it grows with each.
pub const PAUSE: Duration = Duration::from_millis(if cfg!(test) { 10 } else { 500 });
/// What is read of an answer that only tells of a failure, in bytes.
const MAX_FAILURE: usize = 16 << 10;
/// What a token service may answer, in bytes.
const MAX_TOKEN: usize = 256 << 10;
/// How many redirections a request follows.
const MAX_REDIRECTIONS: usize = 5;
/// For how many repositories the authorisation is remembered.
const MAX_AUTHORIZATIONS: usize = 1024;

/// One registry: the origin of an image, or a mirror of it.
pub struct Endpoint {
    /// `HOST` or `HOST:PORT`.
    pub host: String,
    /// For so long it may say nothing.
    pub timeout: Duration,
    /// One for each blob that may be on its way at once.
    pub downloads: Arc<Semaphore>,
    base: Url,
    client: Client,
    credentials: Option<(String, Secret)>,
    /// What to say to the registry, by repository.
    authorizations: Mutex<HashMap<String, HeaderValue>>,
}

/// What a token service answers.
#[derive(Deserialize)]
struct Token {
    #[serde(default)]
    token: String,
    #[serde(default)]
    access_token: String,
}

/// How a registry wants to be asked.
#[derive(Debug, PartialEq, Eq)]
pub enum Challenge {
    /// With name and password.
    Basic,
    /// With a token that a service gives.
    Bearer {
        /// The service's address.
        realm: String,
        /// Whom the token is for.
        service: Option<String>,
    },
}

impl Endpoint {
    /// A registry that is asked as the settings say; nothing is sent yet.
    pub async fn new(
        host: &str,
        settings: &RegistrySettings,
        timeout: Duration,
        downloads: usize,
    ) -> Result<Self, PullError> {
        let ca = match &settings.ca {
            None => None,
            Some(path) => Some(
                tokio::fs::read(path)
                    .await
                    .map_err(|error| PullError::lasting(format!("{}: {error}", path.display())))?,
            ),
        };
        let scheme = if settings.plain_http { "http" } else { "https" };
        // Docker's registry is reached by another name than its images carry.
        let server = if host == "docker.io" {
            "registry-1.docker.io"
        } else {
            host
        };
        let base: Url = format!("{scheme}://{server}/v2/")
            .parse()
            .map_err(|error| PullError::lasting(format!("{host:?} is no host: {error}")))?;
        let client = client(&base, timeout, ca.as_deref(), settings)?;
        Ok(Self {
            host: host.to_owned(),
            timeout,
            downloads: Arc::new(Semaphore::new(downloads)),
            base,
            client,
            credentials: settings.credentials(),
            authorizations: Mutex::default(),
        })
    }

    /// A manifest of a repository, by tag or digest; one longer than `limit` is an error.
    pub async fn manifest(
        &self,
        repository: &str,
        which: &str,
        accepted: &str,
        limit: usize,
    ) -> Result<Bytes, PullError> {
        let path = format!("{repository}/manifests/{which}");
        self.attempt(|| self.small(repository, &path, accepted, limit)).await
    }

    /// A blob of a repository from an offset on. The answer's status says whether it begins there (206) or at its beginning (200).
    pub async fn blob(&self, repository: &str, digest: &str, offset: u64) -> Result<Response, PullError> {
        let path = format!("{repository}/blobs/{digest}");
        self.attempt(|| self.get(repository, &path, "*/*", offset)).await
    }

    async fn small(&self, repository: &str, path: &str, accepted: &str, limit: usize) -> Result<Bytes, PullError> {
        let answer = self.get(repository, path, accepted, 0).await?;
        let body = read(answer, limit).await?;
        body.ok_or_else(|| PullError::lasting(format!("its manifest is larger than {limit} bytes")))
    }

    /// Makes a request, again when the failure may pass.
    async fn attempt<T, F>(&self, request: impl Fn() -> F) -> Result<T, PullError>
    where
        F: Future<Output = Result<T, PullError>>,
    {
        let mut failures = 0;
        loop {
            // The time counts for the whole of what is small: it may not come in drops.
            let outcome = tokio::time::timeout(self.timeout, request()).await;
            let late = |_| {
                Err(PullError::passing(format!(
                    "no answer within {} s",
                    self.timeout.as_secs()
                )))
            };
            match outcome.unwrap_or_else(late) {
                Err(error) if error.may_pass && failures + 1 < ATTEMPTS => failures += 1,
                outcome => return outcome,
            }
            tokio::time::sleep(PAUSE * failures).await;
        }
    }

    /// One request, with a new authorisation when the one that is known does not do.
    async fn get(&self, repository: &str, path: &str, accepted: &str, offset: u64) -> Result<Response, PullError> {
        let url = self
            .base
            .join(path)
            .map_err(|error| PullError::lasting(error.to_string()))?;
        let mut renewed = false;
        loop {
            let mut request = self.client.get(url.clone()).header(ACCEPT, accepted);
            if let Some(authorization) = self.authorizations.lock().await.get(repository) {
                request = request.header(AUTHORIZATION, authorization.clone());
            }
            if offset > 0 {
                request = request.header(RANGE, format!("bytes={offset}-"));
            }
            let answer = request.send().await?;
            match answer.status() {
                StatusCode::OK | StatusCode::PARTIAL_CONTENT => return Ok(answer),
                StatusCode::UNAUTHORIZED if !renewed && self.is_own(answer.url()) => {
                    renewed = true;
                    let authorization = self.authorize(repository, challenge(&answer)).await?;
                    let mut known = self.authorizations.lock().await;
                    if known.len() >= MAX_AUTHORIZATIONS {
                        known.clear();
                    }
                    known.insert(repository.to_owned(), authorization);
                }
                _ => return Err(self.refusal(answer).await),
            }
        }
    }

    /// What the registry wants to hear.
    async fn authorize(&self, repository: &str, challenge: Option<Challenge>) -> Result<HeaderValue, PullError> {
        let basic = self.credentials.as_ref().map(|(username, password)| {
            let both = format!("{username}:{}", password.0);
            format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(both))
        });
        let text = match challenge {
            Some(Challenge::Basic) => basic.ok_or_else(PullError::unauthorized)?,
            Some(Challenge::Bearer { realm, service }) => {
                let token = self.token(repository, &realm, service.as_deref(), basic.as_deref());
                format!("Bearer {}", token.await?)
            }
            None => return Err(PullError::unauthorized()),
        };
        sensitive(&text)
    }

    async fn token(
        &self,
        repository: &str,
        realm: &str,
        service: Option<&str>,
        basic: Option<&str>,
    ) -> Result<String, PullError> {
        let bad = |why: &str| PullError::lasting(format!("its token service {realm:?}: {why}"));
        let mut url: Url = realm.parse().map_err(|_| bad("this is no URL"))?;
        if url.scheme() != "https" && url.scheme() != self.base.scheme() {
            return Err(bad("it is not asked without TLS, for the registry has TLS"));
        }
        let scope = format!("repository:{repository}:pull");
        let service = service.map(|service| ("service", service));
        url.query_pairs_mut()
            .extend_pairs(service.into_iter().chain([("scope", scope.as_str())]));
        let mut request = self.client.get(url);
        if let Some(basic) = basic {
            request = request.header(AUTHORIZATION, sensitive(basic)?);
        }
        let answer = request.send().await?;
        match answer.status() {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => return Err(PullError::unauthorized()),
            status => return Err(PullError::of_status(status, "from its token service")),
        }
        let bytes = read(answer, MAX_TOKEN)
            .await?
            .ok_or_else(|| bad("its answer is too long"))?;
        token_in(&bytes).map_err(|reason| bad(&reason))
    }

    /// Why an answer is no success.
    async fn refusal(&self, answer: Response) -> PullError {
        let status = answer.status();
        if !self.is_own(answer.url()) {
            // Not what it says: a redirection may lead to where others than this agent may not ask.
            let elsewhere = answer.url().host_str().unwrap_or_default();
            return PullError::of_status(status, &format!("from {elsewhere}, where it redirects to"));
        }
        if status == StatusCode::UNAUTHORIZED {
            return PullError::unauthorized();
        }
        let body = read(answer, MAX_FAILURE).await.ok().flatten().unwrap_or_default();
        PullError::of_answer(status, &body)
    }

    /// Whether it is the registry itself, not where it redirected to.
    fn is_own(&self, url: &Url) -> bool {
        url.origin() == self.base.origin()
    }
}

/// The token in a token service's answer.
pub fn token_in(answer: &[u8]) -> Result<String, String> {
    let answer: Token = serde_json::from_slice(answer).map_err(|error| error.to_string())?;
    let mut tokens = [answer.token, answer.access_token].into_iter();
    tokens
        .find(|token| !token.is_empty())
        .ok_or_else(|| "its answer has no token".to_owned())
}

/// An answer's body, or `None` if it is longer than `limit` bytes.
async fn read(mut answer: Response, limit: usize) -> Result<Option<Bytes>, PullError> {
    let mut body = BytesMut::new();
    while let Some(part) = answer.chunk().await? {
        if body.len() + part.len() > limit {
            return Ok(None);
        }
        body.extend_from_slice(&part);
    }
    Ok(Some(body.freeze()))
}

fn sensitive(text: &str) -> Result<HeaderValue, PullError> {
    let mut value = HeaderValue::from_str(text)
        .map_err(|_| PullError::lasting("its token, or our credentials, cannot be in a header of HTTP"))?;
    value.set_sensitive(true);
    Ok(value)
}

/// What a refusal offers.
fn challenge(answer: &Response) -> Option<Challenge> {
    let headers = answer.headers().get_all(WWW_AUTHENTICATE);
    let texts: Vec<&str> = headers.into_iter().filter_map(|header| header.to_str().ok()).collect();
    chosen(&texts)
}

/// Bearer before Basic, of what these headers offer.
pub fn chosen(texts: &[&str]) -> Option<Challenge> {
    let offered = || {
        let parsed = texts.iter().map(|text| http_auth::ChallengeParser::new(text));
        parsed.flatten().filter_map(Result::ok)
    };
    let bearer = offered()
        .filter(|challenge| challenge.scheme.eq_ignore_ascii_case("bearer"))
        .find_map(|challenge| {
            let parameter = |name: &str| {
                let mut named = challenge
                    .params
                    .iter()
                    .filter(|(key, _)| key.eq_ignore_ascii_case(name));
                named.next().map(|(_, value)| value.to_unescaped())
            };
            Some(Challenge::Bearer {
                realm: parameter("realm")?,
                service: parameter("service"),
            })
        });
    let basic = offered().any(|challenge| challenge.scheme.eq_ignore_ascii_case("basic"));
    bearer.or(basic.then_some(Challenge::Basic))
}

fn client(base: &Url, timeout: Duration, ca: Option<&[u8]>, settings: &RegistrySettings) -> Result<Client, PullError> {
    let builder = || {
        let mut builder = Client::builder()
            .user_agent(concat!("orlop/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(timeout.min(Duration::from_secs(15)))
            .redirect(redirect::Policy::custom(follow));
        if is_this_machine(base) {
            builder = builder.no_proxy();
        }
        builder
    };
    let failed = |error: reqwest::Error| PullError::lasting(PullError::from(error).to_string());
    if let Some(ca) = ca {
        let path = settings.ca.clone().unwrap_or_default();
        let certificates = Certificate::from_pem_bundle(ca).unwrap_or_default();
        if certificates.is_empty() {
            return Err(PullError::lasting(format!(
                "{} holds no PEM certificate",
                path.display()
            )));
        }
        return builder().tls_certs_only(certificates).build().map_err(failed);
    }
    match builder().build() {
        Ok(client) => Ok(client),
        // Without TLS no certificates are needed.
        Err(_) if settings.plain_http => builder().tls_certs_only([]).build().map_err(failed),
        Err(error) => Err(PullError::lasting(format!(
            "no TLS: {}; install the system's certificates (ca-certificates), or name the registry's with `ca`",
            failed(error)
        ))),
    }
}

/// Redirections are followed, but never from TLS to where there is none. Credentials stay with the registry.
fn follow(attempt: redirect::Attempt) -> redirect::Action {
    let encrypted = attempt
        .previous()
        .first()
        .is_some_and(|first| first.scheme() == "https");
    if attempt.previous().len() > MAX_REDIRECTIONS {
        attempt.error("it redirects too often")
    } else if encrypted && attempt.url().scheme() != "https" {
        attempt.error("it redirects to where there is no TLS")
    } else {
        attempt.follow()
    }
}

/// No proxy leads to this machine.
fn is_this_machine(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}
