//! containerd's events: they only wake; what happened is observed.

use std::{sync::Arc, time::Duration};

use containerd_client::services::v1::SubscribeRequest;
use tokio::sync::Notify;

use super::{NAMESPACE, client::Client};

/// Subscribes, again and again, and notifies for every event of a task of ours, and after every reconnect.
pub async fn subscribe(client: Client, changed: Arc<Notify>) {
    let mut wait = Duration::from_millis(50);
    loop {
        let filters = vec![format!(
            "namespace=={NAMESPACE},topic~=^/tasks/(exit|oom|delete|start)$"
        )];
        match client
            .events()
            .subscribe(client.request(SubscribeRequest { filters }))
            .await
        {
            Ok(answer) => {
                let mut events = answer.into_inner();
                wait = Duration::from_millis(50);
                // What happened while nobody listened.
                changed.notify_one();
                while let Ok(Some(_)) = events.message().await {
                    changed.notify_one();
                }
                tracing::debug!("containerd's events ended");
                changed.notify_one();
            }
            Err(error) => tracing::debug!(%error, "cannot subscribe to containerd's events"),
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(Duration::from_secs(2));
    }
}
