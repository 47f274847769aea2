//! What of a node pods ask for by word: its name and labels. Nodes are many, and the rest of a node takes ten times as much.

use std::sync::Arc;

use orlop_proto::{Resource as _, core::v1::Node};

/// A node's name and labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// The name.
    pub name: Arc<str>,
    /// In the order of their keys.
    labels: Box<[(Box<str>, Box<str>)]>,
}

impl Named {
    /// Of a node.
    pub fn of(node: &Node) -> Self {
        let labels = node.meta().labels.iter();
        Self {
            name: node.name().into(),
            labels: labels
                .map(|(key, value)| (key.as_str().into(), value.as_str().into()))
                .collect(),
        }
    }

    /// The value of a label.
    pub fn label(&self, key: &str) -> Option<&str> {
        let position = self.labels.binary_search_by(|(known, _)| (**known).cmp(key)).ok()?;
        Some(&self.labels[position].1)
    }
}
