//! An image's StopSignal: what a container is asked to end with.

use nix::sys::signal::Signal;

/// `SIGQUIT`, `quit`, `3`, `SIGRTMIN+3`; SIGTERM for nothing, and for what is no signal.
pub fn number(text: &str) -> u32 {
    let default = libc::SIGTERM.unsigned_abs();
    if text.is_empty() {
        return default;
    }
    parse(&text.to_ascii_uppercase()).unwrap_or_else(|| {
        tracing::warn!(signal = text, "the image's stop signal is not known; SIGTERM is sent");
        default
    })
}

fn parse(text: &str) -> Option<u32> {
    let last = libc::SIGRTMAX().unsigned_abs();
    let signal = if let Ok(number) = text.parse() {
        number
    } else {
        let name = text.strip_prefix("SIG").unwrap_or(text);
        match name.strip_prefix("RTMIN") {
            Some("") => libc::SIGRTMIN().unsigned_abs(),
            Some(offset) => libc::SIGRTMIN()
                .unsigned_abs()
                .checked_add(offset.strip_prefix('+')?.parse().ok()?)?,
            None => (format!("SIG{name}").parse::<Signal>().ok()? as i32).unsigned_abs(),
        }
    };
    (1..=last).contains(&signal).then_some(signal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        for (text, wanted) in [
            ("", 15),
            ("SIGTERM", 15),
            ("SIGQUIT", 3),
            ("quit", 3),
            ("3", 3),
            ("SIGRTMIN+3", libc::SIGRTMIN().unsigned_abs() + 3),
            ("RTMIN", libc::SIGRTMIN().unsigned_abs()),
            ("SIGRTMIN+99", 15),
            ("0", 15),
            ("65", 15),
            ("SIGNONE", 15),
            ("SIG", 15),
        ] {
            assert_eq!(number(text), wanted, "{text}");
        }
    }
}
