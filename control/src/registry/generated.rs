//! Names that the server makes, for `metadata.generateName`.

use rand::Rng as _;

/// What generated names end in: Kubernetes' letters, which make no words.
const SUFFIX: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
const SUFFIX_LENGTH: usize = 5;
const GENERATED_LENGTH: usize = 63;

/// The prefix, cut where the name would be too long, with a random end.
pub(super) fn generate_name(prefix: &str) -> String {
    let mut random = rand::rng();
    let suffix = (0..SUFFIX_LENGTH).map(|_| char::from(SUFFIX[random.random_range(0..SUFFIX.len())]));
    generated_prefix(prefix).chars().chain(suffix).collect()
}

/// What every name that is generated from `prefix` begins with: a long one is cut.
pub(crate) fn generated_prefix(prefix: &str) -> &str {
    match prefix.char_indices().nth(GENERATED_LENGTH - SUFFIX_LENGTH) {
        Some((end, _)) => &prefix[..end],
        None => prefix,
    }
}
