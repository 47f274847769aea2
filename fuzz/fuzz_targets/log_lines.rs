//! The logger's lines: nothing is lost, nothing comes twice, whatever pieces a stream comes in. Three bytes stand for a piece:
//! which byte, and how often.
#![no_main]

#[path = "../../node-agent/src/bin/orlop-logger/lines.rs"]
mod lines;

use libfuzzer_sys::fuzz_target;
use lines::{Lines, MAX_LINE, Tag};

const MOST: usize = 1 << 18;

fuzz_target!(|bytes: &[u8]| {
    let (mut stream, mut written) = (Vec::new(), Vec::new());
    let mut write = |tag: Tag, line: &[u8]| {
        assert!(line.len() <= MAX_LINE && !line.contains(&b'\n'));
        assert!(tag == Tag::Full || line.len() == MAX_LINE);
        written.extend_from_slice(line);
        match tag.letter() {
            'F' => written.push(b'\n'),
            letter => assert_eq!(letter, 'P'),
        }
    };
    let mut lines = Lines::new();
    for piece in bytes.chunks_exact(3) {
        let piece = vec![piece[0]; usize::from(u16::from_be_bytes([piece[1], piece[2]]))];
        if stream.len() + piece.len() > MOST {
            break;
        }
        lines.take(&piece, &mut write);
        stream.extend(piece);
    }
    lines.finish(&mut write);
    if stream.last().is_some_and(|last| *last != b'\n') {
        stream.push(b'\n');
    }
    assert!(written == stream);
});
