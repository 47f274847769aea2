//! Names and hardware addresses that follow from the attachment: an ADD cut off half-way can be found again, and nothing
//! needs to be remembered for DEL.

use sha2::{Digest, Sha256};

const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// What the host's ends of a network's veths begin with: five characters.
pub fn host_prefix(network: &str) -> String {
    format!("o{}", letters(&digest(&["network", network]), 4))
}

/// The host's end of an attachment's veth: the kernel's fifteen characters, fifty bits of them the attachment's.
pub fn host_interface(network: &str, container_id: &str, ifname: &str) -> String {
    let attachment = digest(&["attachment", container_id, ifname]);
    format!("{}{}", host_prefix(network), letters(&attachment, 10))
}

/// A locally administered unicast address. `end` tells the veth's ends apart.
pub fn mac(end: &str, network: &str, container_id: &str, ifname: &str) -> [u8; 6] {
    let digest = digest(&["mac", end, network, container_id, ifname]);
    let mut mac = [0; 6];
    mac.copy_from_slice(&digest[..6]);
    mac[0] = (mac[0] | 0x02) & !0x01;
    mac
}

fn digest(parts: &[&str]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update(part.as_bytes());
        hasher.update([0]);
    }
    hasher.finalize().into()
}

fn letters(digest: &[u8; 32], count: usize) -> String {
    digest[..count]
        .iter()
        .map(|byte| char::from(ALPHABET[usize::from(byte & 31)]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_fits_and_tells_attachments_apart() {
        let name = host_interface("net", "a", "eth0");
        assert_eq!(name.len(), 15);
        assert!(name.starts_with(&host_prefix("net")));
        assert_ne!(name, host_interface("net", "ae", "th0"));
        assert_ne!(name, host_interface("other", "a", "eth0"));
        assert_eq!(mac("pod", "net", "a", "eth0")[0] & 3, 2);
    }
}
