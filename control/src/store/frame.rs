//! What stands around a value in both engines: magic, format version, length. It tells what is ours and whole from what is not, and
//! what a newer version of control wrote: that is refused wherever it is met, for to an older one it must not look like nothing. A flipped
//! bit must not look like a newer version: no other format may have its true length where version 1 has it.

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
    let length = u32::from_le_bytes([header[5], header[6], header[7], header[8]]);
    let is_true = u32::try_from(value.len()) == Ok(length);
    match header[4] {
        VERSION => {}
        format if format == 0 || is_true => {
            return Err(damaged(format!("version {format} in a frame of version {VERSION}")));
        }
        format => {
            let (key, known) = (key.clone(), VERSION);
            return Err(StoreError::Newer { key, format, known });
        }
    }
    if !is_true {
        return Err(damaged(format!("{} bytes of {length}", value.len())));
    }
    Ok(Bytes::copy_from_slice(value))
}

/// The same for readers of many values: a damaged one is reported and put aside. One of a newer format is an error.
pub(super) fn unframe_or_report(key: &Key, framed: &[u8]) -> Result<Option<Bytes>, StoreError> {
    match unframe(key, framed) {
        Ok(value) => Ok(Some(value)),
        Err(error @ StoreError::Newer { .. }) => Err(error),
        Err(error) => {
            tracing::error!(%key, %error, "a stored value is damaged and was put aside");
            Ok(None)
        }
    }
}

/// What a watch tells of a write. Readers see a damaged value as none: so its coming is a deletion of what was there before. That of a
/// value of a newer format is an error.
pub(super) fn change(
    key: Key,
    revision: Revision,
    now: Option<&[u8]>,
    before: Option<&[u8]>,
) -> Result<Option<Change>, StoreError> {
    let previous = before.and_then(|before| unframe(&key, before).ok());
    let now = now.map(|now| unframe_or_report(&key, now)).transpose()?.flatten();
    Ok(match now {
        Some(value) => Some(Change::Put {
            record: Record { key, value, revision },
            previous,
        }),
        None => previous.map(|previous| Change::Delete { key, previous }),
    })
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
            assert!(
                matches!(unframe(&key, &wrong), Err(StoreError::Damaged { .. })),
                "byte {position}"
            );
        }
    }

    #[test]
    fn the_frame_is_as_the_first_version_wrote_it() {
        let first = b"orlp\x01\x05\0\0\0value";
        assert_eq!(
            frame(b"value"),
            first,
            "written in another way: it needs another version"
        );
        let key = Key::internal("tokens", "a");
        let error = unframe(&key, b"orlp\x02whatever comes then").unwrap_err();
        assert_eq!(
            error.to_string(),
            "tokens/a: a newer orlop-control wrote this in format 2, and this one reads format 1: start the newer one again"
        );
    }

    #[test]
    fn a_damaged_value_counts_as_none_in_a_watch() {
        let key = Key::internal("tokens", "a");
        let good = frame(b"value");
        let change = |now, before| change(key.clone(), 3, now, before).unwrap();
        assert!(matches!(
            change(Some(b"garbage"), Some(&good)),
            Some(Change::Delete { .. })
        ));
        assert!(matches!(
            change(Some(&good), Some(b"garbage")),
            Some(Change::Put { previous: None, .. })
        ));
        assert_eq!(change(None, Some(b"garbage")), None);
    }
}
