//! `orlop-bridge`: a CNI plugin that connects containers through a Linux bridge, alone usable under any CNI runtime.
//!
//! It speaks the specification's versions 0.3.1, 0.4.0, 1.0.0 and 1.1.0. Links, addresses and routes go through netlink, in
//! one short-lived process: nothing is shelled out to, nothing stays behind.
//!
//! The front door (verbs, environment, versions, errors) is ours, for the cni-plugin crate knows neither STATUS nor GC, refuses
//! 0.3.x and container ids in upper case. From the crate come the types of ranges and hardware addresses, and of the
//! configuration and result that are exchanged with another plugin's address management.

use serde_json::{Map, Value, json};

use config::Config;
use error::{Failure, code};
use request::{Env, Verb};
use version::CniVersion;

pub mod check;
pub mod config;
pub mod delegate;
pub mod error;
pub mod ipam;
pub mod link;
pub mod names;
pub mod netns;
pub mod plugin;
pub mod request;
pub mod result;
pub mod unlink;
pub mod version;

/// Does one call: what to print, if anything, or the error's JSON.
pub async fn run(env: &Env, stdin: &[u8]) -> Result<Option<Value>, Value> {
    // Errors answer in the version of the configuration, where that can be read.
    let object = config::object(stdin);
    let spoken = object
        .as_ref()
        .ok()
        .and_then(|o| config::version(o).ok())
        .unwrap_or(CniVersion::LATEST);
    dispatch(env, object)
        .await
        .map_err(|failure| failure.to_json(spoken.as_str()))
}

async fn dispatch(env: &Env, object: Result<Map<String, Value>, Failure>) -> Result<Option<Value>, Failure> {
    let verb = request::verb(env)?;
    if verb == Verb::Version {
        return Ok(Some(versions(object.ok().as_ref())));
    }
    let object = object?;
    let version = config::version(&object)?;
    let since = match verb {
        Verb::Check => CniVersion::V0_4_0,
        Verb::Status | Verb::Gc => CniVersion::V1_1_0,
        Verb::Add | Verb::Del | Verb::Version => CniVersion::V0_3_1,
    };
    if version < since {
        let msg = format!("{verb:?} needs cniVersion {since}, config is {version}");
        return Err(Failure::new(code::INCOMPATIBLE_VERSION, msg));
    }
    if matches!(verb, Verb::Status | Verb::Gc) {
        let config = Config::parse(object, &Env::new())?;
        return match verb {
            Verb::Status => plugin::status(&config, env).await,
            _ => plugin::gc(&config, env).await,
        }
        .map(|()| None);
    }
    let at = request::attachment(env, verb)?;
    let config = Config::parse(object, &at.args)?;
    match verb {
        Verb::Add => Ok(Some(plugin::add(&config, &at, env).await?.to_json(config.version))),
        Verb::Check => check::check(&config, &at, env).await.map(|()| None),
        _ => plugin::del(&config, &at, env).await.map(|()| None),
    }
}

/// The answer to VERSION; it repeats the asker's version.
fn versions(object: Option<&Map<String, Value>>) -> Value {
    let asked = object
        .and_then(|o| o.get("cniVersion"))
        .and_then(Value::as_str)
        .unwrap_or(CniVersion::LATEST.as_str());
    json!({"cniVersion": asked, "supportedVersions": CniVersion::ALL.map(CniVersion::as_str)})
}
