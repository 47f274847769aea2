//! A stream that comes in pieces becomes lines; one that is too long comes in parts.

/// A longer line is written in parts.
pub const MAX_LINE: usize = 16 << 10;

/// What the log says of a line: the CRI's tags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tag {
    /// The line goes on.
    Partial,
    /// The line, or its last part.
    Full,
}

impl Tag {
    /// As it stands in the log.
    pub fn letter(self) -> char {
        match self {
            Self::Partial => 'P',
            Self::Full => 'F',
        }
    }
}

/// The line that is not complete yet.
#[derive(Debug)]
pub struct Lines {
    line: Vec<u8>,
}

impl Lines {
    /// Nothing has come.
    pub fn new() -> Self {
        Self {
            line: Vec::with_capacity(MAX_LINE),
        }
    }

    /// Takes the next bytes, and hands on every line that is complete, and every part that is full and not a line's last.
    pub fn take(&mut self, mut bytes: &[u8], mut write: impl FnMut(Tag, &[u8])) {
        while let Some(first) = bytes.first() {
            let room = MAX_LINE - self.line.len();
            // Only now is it known that the line goes on.
            if room == 0 && *first != b'\n' {
                write(Tag::Partial, &self.line);
                self.line.clear();
                continue;
            }
            // The newline may be the very next byte after a full part.
            if let Some(end) = bytes.iter().take(room + 1).position(|byte| *byte == b'\n') {
                self.line.extend_from_slice(&bytes[..end]);
                bytes = &bytes[end + 1..];
                write(Tag::Full, &self.line);
                self.line.clear();
            } else {
                let (part, rest) = bytes.split_at(room.min(bytes.len()));
                self.line.extend_from_slice(part);
                bytes = rest;
            }
        }
    }

    /// The stream has ended: hands on what is left.
    pub fn finish(&mut self, write: impl FnOnce(Tag, &[u8])) {
        if !self.line.is_empty() {
            write(Tag::Full, &self.line);
            self.line.clear();
        }
    }
}
