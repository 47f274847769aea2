//! Times as protobuf and Kubernetes' JSON have them.

use jiff::Timestamp as Instant;
use prost_types::Timestamp;

/// From 0001-01-01T00:00:00Z to 9999-12-30T22:00:00Z: what RFC 3339 can write, whatever the offset.
const RANGE: std::ops::RangeInclusive<i64> = -62_135_596_800..=253_402_207_200;

/// A text is not a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeError;

impl std::fmt::Display for TimeError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("not a time as RFC 3339 writes it")
    }
}

impl std::error::Error for TimeError {}

/// The present moment.
pub fn now() -> Timestamp {
    from_instant(Instant::now())
}

/// The present moment in whole seconds, as a metav1.Time has it.
pub fn now_seconds() -> Timestamp {
    Timestamp { nanos: 0, ..now() }
}

/// From jiff's type.
pub fn from_instant(instant: Instant) -> Timestamp {
    let nanos = instant.as_nanosecond();
    let second = nanos.div_euclid(1_000_000_000);
    let rest = nanos.rem_euclid(1_000_000_000);
    Timestamp {
        seconds: i64::try_from(second).unwrap_or_default(),
        nanos: i32::try_from(rest).unwrap_or_default(),
    }
}

/// As jiff's type; what RFC 3339 cannot write becomes the nearest time that it can.
pub fn to_instant(timestamp: &Timestamp) -> Instant {
    let seconds = timestamp.seconds.clamp(*RANGE.start(), *RANGE.end());
    let nanos = if seconds == timestamp.seconds {
        timestamp.nanos.clamp(0, 999_999_999)
    } else {
        0
    };
    Instant::new(seconds, nanos).unwrap_or(Instant::UNIX_EPOCH)
}

/// Whether RFC 3339 can write the time.
pub fn is_valid(timestamp: &Timestamp) -> bool {
    RANGE.contains(&timestamp.seconds) && (0..1_000_000_000).contains(&timestamp.nanos)
}

/// "2006-01-02T15:04:05Z": a metav1.Time.
pub fn format_seconds(timestamp: &Timestamp) -> String {
    format!("{:.0}", to_instant(&Timestamp { nanos: 0, ..*timestamp }))
}

/// "2006-01-02T15:04:05.000000Z": a metav1.MicroTime.
pub fn format_micros(timestamp: &Timestamp) -> String {
    let nanos = timestamp.nanos / 1000 * 1000;
    format!("{:.6}", to_instant(&Timestamp { nanos, ..*timestamp }))
}

/// Parses RFC 3339: date, `T`, time, perhaps a fraction, `Z` or an offset.
pub fn parse(text: &str) -> Result<Timestamp, TimeError> {
    let bytes = text.as_bytes();
    let at = |index: usize, expected: u8| bytes.get(index) == Some(&expected);
    let zone = bytes.last() == Some(&b'Z')
        || (bytes.len() > 24 && matches!(bytes[bytes.len() - 6], b'+' | b'-') && at(bytes.len() - 3, b':'));
    let shape = at(4, b'-') && at(7, b'-') && at(10, b'T') && at(13, b':') && at(16, b':');
    if !shape || !zone || !bytes[17..].first().is_some_and(u8::is_ascii_digit) {
        return Err(TimeError);
    }
    let instant: Instant = text.parse().map_err(|_| TimeError)?;
    let timestamp = from_instant(instant);
    if is_valid(&timestamp) {
        Ok(timestamp)
    } else {
        Err(TimeError)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_come_back() {
        for (text, seconds, micros) in [
            (
                "2024-02-29T12:34:56Z",
                "2024-02-29T12:34:56Z",
                "2024-02-29T12:34:56.000000Z",
            ),
            (
                "2024-02-29T12:34:56.1234567Z",
                "2024-02-29T12:34:56Z",
                "2024-02-29T12:34:56.123456Z",
            ),
            (
                "2024-02-29T12:34:56+02:00",
                "2024-02-29T10:34:56Z",
                "2024-02-29T10:34:56.000000Z",
            ),
            (
                "1969-12-31T23:59:59.5Z",
                "1969-12-31T23:59:59Z",
                "1969-12-31T23:59:59.500000Z",
            ),
            (
                "0001-01-01T00:00:00Z",
                "0001-01-01T00:00:00Z",
                "0001-01-01T00:00:00.000000Z",
            ),
        ] {
            let parsed = parse(text).expect(text);
            assert_eq!(format_seconds(&parsed), seconds);
            assert_eq!(format_micros(&parsed), micros);
        }
    }

    #[test]
    fn what_is_not_rfc_3339_is_refused() {
        for text in [
            "",
            "2024-02-30T00:00:00Z",
            "2024-01-01",
            "2024-01-01 00:00:00Z",
            "2024-01-01T00:00Z",
            "now",
            "2024-01-01T00:00:00",
        ] {
            assert_eq!(parse(text), Err(TimeError), "{text}");
        }
    }

    #[test]
    fn hostile_timestamps_are_written_all_the_same() {
        let late = Timestamp {
            seconds: i64::MAX,
            nanos: i32::MIN,
        };
        assert!(!is_valid(&late));
        assert_eq!(format_seconds(&late), "9999-12-30T22:00:00Z");
        assert_eq!(
            format_micros(&Timestamp {
                seconds: i64::MIN,
                nanos: -1
            }),
            "0001-01-01T00:00:00.000000Z"
        );
    }
}
