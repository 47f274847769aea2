//! What the calls of [`Network`](super::Network) are made of: plugins' verbs over a whole list, and what is kept of them.

use std::{collections::BTreeSet, path::PathBuf};

use serde_json::{Map, Value, json};

use super::{CniNetwork, IFNAME, NetworkError, NetworkStatus, PodNetwork, Record};
use crate::network::{
    conflist::{ConfList, plugin_type},
    namespace,
    own_conflist::OWN_PLUGIN,
    plugin, result,
};

impl CniNetwork {
    /// Runs the list's ADDs, each with the result of the one before; that result stays in `reached`, also when the next fails.
    /// Plugins that know the capability `ips` are asked for these addresses.
    async fn add_list(
        &self,
        record: &mut Record,
        pod: &PodNetwork,
        ips: &[String],
    ) -> Result<NetworkStatus, NetworkError> {
        let list = record.list.clone();
        for (at, config) in list.plugins.iter().enumerate() {
            if at > 0 {
                // What this plugin makes its DEL may find only by this result, should the agent not live to see its own.
                self.attachments.write(record)?;
            }
            let asked = (!ips.is_empty()).then(|| ("ips".to_owned(), json!(ips)));
            let given = self
                .run_with(&list, config, "ADD", Some(pod), record.reached.as_ref(), asked)
                .await?;
            let bad = |reason: &str| no_result(config, reason);
            match given {
                Some(Value::Object(object)) => record.reached = Some(Value::Object(object)),
                Some(_) => return Err(bad("printed what is no result")),
                None => return Err(bad("printed no result")),
            }
        }
        let (Some(value), Some(last)) = (&record.reached, list.plugins.last()) else {
            return Err(NetworkError::NotConfigured("a network without plugins".into()));
        };
        result::status(value, &pod.netns).map_err(|reason| {
            // To DEL it would make no more sense than to us.
            let error = no_result(last, &reason);
            record.reached = None;
            error
        })
    }

    /// Runs the list's DELs in reverse, all of them even if some fail.
    async fn del_list(&self, list: &ConfList, pod: &PodNetwork, previous: Option<&Value>) -> Result<(), NetworkError> {
        // Before 0.4.0 DEL had no prevResult.
        let previous = previous.filter(|_| list.at_least("0.4.0"));
        let mut errors = Vec::new();
        for config in list.plugins.iter().rev() {
            errors.extend(self.run(list, config, "DEL", Some(pod), previous).await.err());
        }
        match errors.len() {
            0 => Ok(()),
            1 => Err(errors.remove(0)),
            _ => Err(NetworkError::Several(errors)),
        }
    }

    pub(super) async fn run(
        &self,
        list: &ConfList,
        config: &Map<String, Value>,
        command: &'static str,
        pod: Option<&PodNetwork>,
        previous: Option<&Value>,
    ) -> Result<Option<Value>, NetworkError> {
        self.run_with(list, config, command, pod, previous, None).await
    }

    /// The same with one more capability's argument.
    async fn run_with(
        &self,
        list: &ConfList,
        config: &Map<String, Value>,
        command: &'static str,
        pod: Option<&PodNetwork>,
        previous: Option<&Value>,
        asked: Option<(String, Value)>,
    ) -> Result<Option<Value>, NetworkError> {
        let mut more = Vec::new();
        let declared = config.get("capabilities").and_then(Value::as_object);
        let wants = |name: &String| declared.is_some_and(|d| d.get(name) == Some(&Value::Bool(true)));
        let args: Map<String, Value> = self
            .settings
            .capability_args
            .iter()
            .filter(|(name, _)| wants(name))
            .map(|(n, v)| (n.clone(), v.clone()))
            .chain(asked.filter(|(name, _)| wants(name)))
            .collect();
        if !args.is_empty() {
            more.push(("runtimeConfig", Value::Object(args)));
        }
        more.extend(previous.map(|value| ("prevResult", value.clone())));
        self.call(list, config, command, pod, &more).await
    }

    pub(super) async fn call(
        &self,
        list: &ConfList,
        config: &Map<String, Value>,
        command: &'static str,
        pod: Option<&PodNetwork>,
        more: &[(&str, Value)],
    ) -> Result<Option<Value>, NetworkError> {
        let env = pod.map(environment).unwrap_or_default();
        let call = plugin::Call {
            bin_dirs: &self.settings.bin_dirs,
            plugin: plugin_type(config),
            command,
            env: &env,
            config: &list.config(config, more),
            timeout: self.settings.plugin_timeout,
        };
        call.run().await
    }

    /// One ADD of the whole list, and the end of what a failed one left.
    pub(super) async fn add_recorded(
        &self,
        record: &mut Record,
        pod: &PodNetwork,
        ips: &[String],
    ) -> Result<NetworkStatus, NetworkError> {
        self.attachments.write(record)?;
        match self.add_list(record, pod, ips).await {
            Ok(status) => {
                record.result = record.reached.take();
                self.attachments.write(record)?;
                tracing::debug!(sandbox = pod.sandbox_id, addresses = ?status.addresses, "network added");
                Ok(status)
            }
            Err(error) => {
                // The record stays if this fails, and the caller's DEL does it again.
                let noted = self.attachments.write(record);
                if let Err(undo) = noted.and(self.del_recorded(&pod.sandbox_id).await) {
                    tracing::warn!(sandbox = pod.sandbox_id, error = %undo, "a failed ADD is not rolled back yet");
                }
                Err(error)
            }
        }
    }

    /// DEL and the end of the record. Without a record nothing was added.
    pub(super) async fn del_recorded(&self, sandbox_id: &str) -> Result<(), NetworkError> {
        let Some(record) = self.record(sandbox_id)? else {
            return Ok(());
        };
        let mut pod = PodNetwork::from(&record.pod);
        if namespace::identity(&pod.netns).is_none() {
            // The specification: no namespace any more, no path of it.
            pod.netns = PathBuf::new();
        }
        let previous = record.result.as_ref().or(record.reached.as_ref());
        if let Some(result) = &record.result {
            // Of another boot: the pod goes on, and control may not be there to be told of other addresses.
            let rebooted = self.boot_id().is_ok_and(|now| now != record.boot_id);
            let had = result::addresses(result, &PodNetwork::from(&record.pod).netns);
            if let Err(error) = self.addresses.keep(&pod.uid, had, rebooted) {
                tracing::warn!(pod = pod.uid, %error, "the pod's addresses are only remembered until the agent ends");
            }
        }
        self.del_list(&record.list, &pod, previous).await?;
        self.attachments.remove(sandbox_id)
    }

    pub(super) async fn garbage_verb(&self, valid: &BTreeSet<String>) -> Result<(), NetworkError> {
        let list = match self.configurations.load() {
            Ok(list) if list.at_least("1.1.0") && !list.disable_gc => list,
            Ok(_) | Err(NetworkError::NotConfigured(_)) => return Ok(()),
            Err(error) => return Err(error),
        };
        let attachments: Vec<Value> = valid
            .iter()
            .map(|id| json!({"containerID": id, "ifname": IFNAME}))
            .collect();
        let mut errors = Vec::new();
        for config in &list.plugins {
            let more = [("cni.dev/valid-attachments", attachments.clone().into())];
            errors.extend(self.call(&list, config, "GC", None, &more).await.err());
        }
        if errors.is_empty() {
            Ok(())
        } else {
            Err(NetworkError::Several(errors))
        }
    }
}

fn no_result(config: &Map<String, Value>, reason: &str) -> NetworkError {
    NetworkError::Exec {
        plugin: plugin_type(config).to_owned(),
        command: "ADD",
        reason: reason.to_owned(),
    }
}

fn environment(pod: &PodNetwork) -> Vec<(&'static str, String)> {
    // `;` and `=` cannot be in these names by Kubernetes' rules; they would be other arguments.
    let clean = |text: &str| text.replace([';', '='], "_");
    let args = format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
        clean(&pod.namespace),
        clean(&pod.name),
        pod.sandbox_id,
        clean(&pod.uid)
    );
    vec![
        ("CNI_CONTAINERID", pod.sandbox_id.clone()),
        ("CNI_IFNAME", IFNAME.to_owned()),
        ("CNI_NETNS", pod.netns.to_string_lossy().into_owned()),
        ("CNI_ARGS", args),
    ]
}

/// Whether an ADD may have failed for the addresses that it asked for, and not for what may be over at the next try: the pod
/// would lose them for nothing, while other nodes still send its connections there.
pub(super) fn refuses_addresses(list: &ConfList, error: &NetworkError) -> bool {
    // docs/cni.md: configurations that cannot be, addresses in use, what a foreign IPAM plugin says.
    const OWN: [u32; 3] = [7, 102, 104];
    let NetworkError::Plugin { plugin, code, .. } = error else {
        return false;
    };
    if plugin == OWN_PLUGIN {
        return OWN.contains(code);
    }
    // Others' codes say nothing. Who was not asked has nothing to refuse.
    list.plugins
        .iter()
        .any(|config| plugin_type(config) == plugin && config.get("capabilities").is_some_and(|all| all["ips"] == true))
}
