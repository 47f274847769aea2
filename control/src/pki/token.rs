//! Join tokens: `orlop1.ID.SECRET.CAHASH`.

use std::{fmt, time::SystemTime};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::store::Key;

const ID_BYTES: usize = 8;
const SECRET_BYTES: usize = 32;
/// The store's resource for tokens.
pub const TOKENS: &str = "tokens";

/// A token, as a machine presents it.
#[derive(Clone)]
pub struct Token {
    /// Finds the record; no secret.
    pub id: String,
    secret: [u8; SECRET_BYTES],
    /// SHA-256 of the CA's certificate, hex.
    pub ca_hash: String,
}

/// It is not written like a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a join token (orlop1.ID.SECRET.CAHASH)")]
pub struct TokenError;

/// What the store keeps of a token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// SHA-256 of the secret, hex. The secret has 256 random bits, so a slow hash would add nothing.
    pub secret_hash: String,
    /// Seconds since 1970.
    pub expires: u64,
    /// How many more nodes may join; `None`: no limit.
    pub uses_left: Option<u32>,
}

impl Token {
    /// A new one.
    pub fn generate(ca_hash: &str) -> Self {
        let id: [u8; ID_BYTES] = rand::random();
        Self {
            id: hex::encode(id),
            secret: rand::random(),
            ca_hash: ca_hash.to_owned(),
        }
    }

    /// From its text.
    ///
    /// # Errors
    /// When it is not written like a token.
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let mut parts = text.split('.');
        let (Some("orlop1"), Some(id), Some(secret), Some(ca_hash), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(TokenError);
        };
        let mut bytes = [0; SECRET_BYTES];
        hex::decode_to_slice(secret, &mut bytes).map_err(|_| TokenError)?;
        if !is_id(id) || hex::decode(ca_hash).map_err(|_| TokenError)?.len() != 32 {
            return Err(TokenError);
        }
        Ok(Self {
            id: id.to_owned(),
            secret: bytes,
            ca_hash: ca_hash.to_owned(),
        })
    }

    /// What to store of it.
    pub fn record(&self, expires: SystemTime, uses: Option<u32>) -> TokenRecord {
        let expires = expires
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        TokenRecord {
            secret_hash: hex::encode(Sha256::digest(self.secret)),
            expires,
            uses_left: uses,
        }
    }

    /// Whether the record is of this token's secret.
    pub fn matches(&self, record: &TokenRecord) -> bool {
        let Ok(stored) = hex::decode(&record.secret_hash) else {
            return false;
        };
        same(&Sha256::digest(self.secret), &stored)
    }

    /// Where its record is.
    pub fn key(&self) -> Key {
        Key::internal(TOKENS, &self.id)
    }
}

/// Whether two hashes are equal, in a time that does not say where they differ.
fn same(left: &[u8], right: &[u8]) -> bool {
    let difference = left
        .iter()
        .zip(right)
        .fold(0, |difference, (left, right)| difference | (left ^ right));
    left.len() == right.len() && std::hint::black_box(difference) == 0
}

/// Whether a text can be a token's ID, and so part of a key.
pub fn is_id(text: &str) -> bool {
    text.len() == 2 * ID_BYTES && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

impl TokenRecord {
    /// Whether its time is over.
    pub fn is_expired(&self, now: SystemTime) -> bool {
        self.expires <= now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
    }
}

impl fmt::Display for Token {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "orlop1.{}.{}.{}",
            self.id,
            hex::encode(self.secret),
            self.ca_hash
        )
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Token")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        let token = Token::generate(&"ab".repeat(32));
        let again = Token::parse(&token.to_string()).expect("parses");
        let record = token.record(SystemTime::now(), None);
        assert!(again.matches(&record));
        assert_eq!(again.ca_hash, "ab".repeat(32));
        assert!(!Token::generate("").matches(&record));
        assert!(!format!("{token:?}").contains(&hex::encode(token.secret)));
    }

    #[test]
    fn records_that_other_versions_stored_are_read() {
        for later in ["", r#","later":{"of":[1]}"#] {
            let text = format!(r#"{{"secret_hash":"ab","expires":7,"uses_left":2{later}}}"#);
            let record: TokenRecord = serde_json::from_str(&text).expect("a record");
            assert_eq!(
                (&*record.secret_hash, record.expires, record.uses_left),
                ("ab", 7, Some(2))
            );
        }
    }

    #[test]
    fn what_is_no_token() {
        let good = Token::generate(&"ab".repeat(32)).to_string();
        let id = good.split('.').nth(1).expect("id").to_owned();
        for bad in [
            String::new(),
            "orlop1...".to_owned(),
            good.replace("orlop1", "orlop2"),
            format!("{good}.x"),
            good[..good.len() - 2].to_owned(),
            good.replace(&id, "../../../../etc/"),
            good.replace(&id, &id.to_uppercase().replace(char::is_numeric, "A")),
        ] {
            assert_eq!(Token::parse(&bad).err(), Some(TokenError), "{bad}");
        }
    }
}
