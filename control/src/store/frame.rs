//! What stands around a value in both engines: magic, format version, length. It tells what is ours and whole from what is not.

use bytes::Bytes;

use super::{Change, Key, Record, Revision, StoreError};

/// Before every key in both engines.
pub(super) const PREFIX: &str = "/orlop/v1/";

const MAGIC: &[u8; 4] = b"orlp";
const VERSION: u8 = 1;
const HEADER: usize = MAGIC.len() + 1 + 4;

/// The value with its frame. Values are bounded by the size of a transaction.
pub(super) fn frame(value: &[u8]) -> Vec<u8> {
    let length = u32::try_from(value.len()).unwrap_or(u32::MAX);
    let mut framed = Vec::with_capacity(HEADER + value.len());
    framed.extend_from_slice(MAGIC);
    framed.push(VERSION);
    framed.extend_from_slice(&length.to_le_bytes());
    framed.extend_from_slice(value);
    framed
}

/// The value inside.
pub(super) fn unframe(key: &Key, framed: &[u8]) -> Result<Bytes, StoreError> {
    let damaged = |reason: String| StoreError::damaged(key, reason);
    let Some((header, value)) = framed.split_at_checked(HEADER) else {
        return Err(damaged(format!("{} bytes, a header has {HEADER}", framed.len())));
    };
    if &header[..4] != MAGIC {
        return Err(damaged("not written by us: another magic number".to_owned()));
    }
    if header[4] != VERSION {
        return Err(damaged(format!("format version {}, known is {VERSION}", header[4])));
    }
    let length = u32::from_le_bytes([header[5], header[6], header[7], header[8]]);
    if u32::try_from(value.len()) != Ok(length) {
        return Err(damaged(format!("{} bytes of {length}", value.len())));
    }
    Ok(Bytes::copy_from_slice(value))
}

/// The same for readers of many values: a damaged one is reported and put aside.
pub(super) fn unframe_or_report(key: &Key, framed: &[u8]) -> Option<Bytes> {
    unframe(key, framed)
        .inspect_err(|error| tracing::error!(%key, %error, "a stored value is damaged and was put aside"))
        .ok()
}

/// What a watch tells of a write. Readers see a damaged value as none: so its coming is a deletion of what was there before.
pub(super) fn change(key: Key, revision: Revision, now: Option<&[u8]>, before: Option<&[u8]>) -> Option<Change> {
    let previous = before.and_then(|before| unframe(&key, before).ok());
    match now.and_then(|now| unframe_or_report(&key, now)) {
        Some(value) => Some(Change::Put {
            record: Record { key, value, revision },
            previous,
        }),
        None => previous.map(|previous| Change::Delete { key, previous }),
    }
}

/// [`frame`], for who checks it from outside.
#[doc(hidden)]
pub fn framed(value: &[u8]) -> Vec<u8> {
    frame(value)
}

/// [`unframe`], for who checks it from outside.
#[doc(hidden)]
pub fn unframed(framed: &[u8]) -> Result<Bytes, StoreError> {
    unframe(&Key::internal("outside", "value"), framed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_framed_comes_back_and_what_is_damaged_does_not() {
        let key = Key::internal("tokens", "a");
        let framed = frame(b"value");
        assert_eq!(unframe(&key, &framed).unwrap(), Bytes::from_static(b"value"));
        assert_eq!(unframe(&key, &frame(b"")).unwrap(), Bytes::new());
        for length in 0..framed.len() {
            assert!(
                matches!(unframe(&key, &framed[..length]), Err(StoreError::Damaged { .. })),
                "{length} bytes"
            );
        }
        let mut longer = framed.clone();
        longer.push(0);
        assert!(unframe(&key, &longer).is_err());
        for position in 0..HEADER {
            let mut wrong = framed.clone();
            wrong[position] ^= 0x40;
            assert!(unframe(&key, &wrong).is_err(), "byte {position}");
        }
    }

    #[test]
    fn a_damaged_value_counts_as_none_in_a_watch() {
        let key = Key::internal("tokens", "a");
        let good = frame(b"value");
        assert!(matches!(
            change(key.clone(), 3, Some(b"garbage"), Some(&good)),
            Some(Change::Delete { .. })
        ));
        assert!(matches!(
            change(key.clone(), 3, Some(&good), Some(b"garbage")),
            Some(Change::Put { previous: None, .. })
        ));
        assert_eq!(change(key, 3, None, Some(b"garbage")), None);
    }
}
