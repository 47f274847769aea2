//! Writes a container's output to its log file in the CRI format, with rotation.
//!
//! The containerd shim starts it for a task whose output is `binary:///path/orlop-logger?log=FILE`: file descriptors 3 and 4 are
//! the task's stdout and stderr, closing 5 says that we are ready. It belongs to no agent: it ends when both streams have.
//! A log that cannot be written (a full disk) loses lines; the container is never held up.

mod lines;

use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    io::{self, Read, Write as _},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
};

use lines::{Lines, Tag};

/// A log that reached this size is rotated.
const MAX_FILE: u64 = 10 << 20;
/// How many files a log has: the one that is written, and `.1` (the youngest) to `.4`.
const FILES: u32 = 5;
/// After SIGTERM: silence for this many milliseconds means that nothing more will come.
const LINGER_MS: i32 = 300;

static TERMINATED: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("orlop-logger: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<()> {
    let path = log_path(std::env::args_os().skip(1))
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "usage: orlop-logger log FILE"))?;
    catch_signals();
    // SAFETY: the shim passes these descriptors, and nothing else in this process owns them.
    let (stdout, stderr, ready) = unsafe {
        (
            OwnedFd::from_raw_fd(3),
            OwnedFd::from_raw_fd(4),
            OwnedFd::from_raw_fd(5),
        )
    };
    let mut log = Log::open(path, MAX_FILE);
    drop(ready);
    copy(&mut log, [Stream::new(stdout, "stdout"), Stream::new(stderr, "stderr")])
}

/// The shim passes key and value of its URI's query as arguments.
fn log_path(mut arguments: impl Iterator<Item = OsString>) -> Option<PathBuf> {
    while let Some(argument) = arguments.next() {
        if argument == "log" {
            return arguments.next().map(PathBuf::from).filter(|path| path.is_absolute());
        }
    }
    None
}

/// SIGTERM, which the shim sends when the task is deleted, asks to finish; a session of its own keeps other signals away.
fn catch_signals() {
    extern "C" fn terminate(_: libc::c_int) {
        TERMINATED.store(true, Ordering::Relaxed);
    }
    let handler: extern "C" fn(libc::c_int) = terminate;
    // SAFETY: the handler only stores to an atomic; the action is fully initialised (zero is valid for it).
    unsafe {
        libc::setsid();
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as libc::sighandler_t;
        libc::sigaction(libc::SIGTERM, &raw const action, std::ptr::null_mut());
        libc::signal(libc::SIGINT, libc::SIG_IGN);
        libc::signal(libc::SIGHUP, libc::SIG_IGN);
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
    }
}

/// Copies until both streams have ended.
fn copy(log: &mut Log, mut streams: [Stream; 2]) -> io::Result<()> {
    while streams.iter().any(|stream| stream.file.is_some()) {
        let mut polled = [0, 1].map(|at| libc::pollfd {
            fd: streams[at].file.as_ref().map_or(-1, File::as_raw_fd),
            events: libc::POLLIN,
            revents: 0,
        });
        let terminated = TERMINATED.load(Ordering::Relaxed);
        let timeout = if terminated { LINGER_MS } else { -1 };
        // SAFETY: the pointer and the length are of the same live array.
        let count = unsafe { libc::poll(polled.as_mut_ptr(), 2, timeout) };
        if count < 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        }
        if count == 0 && terminated {
            break;
        }
        for (stream, polled) in streams.iter_mut().zip(polled) {
            if polled.revents != 0 {
                stream.read(log)?;
            }
        }
    }
    for stream in &mut streams {
        stream.finish(log);
    }
    Ok(())
}

/// One of the task's streams.
struct Stream {
    file: Option<File>,
    name: &'static str,
    lines: Lines,
}

impl Stream {
    fn new(fd: OwnedFd, name: &'static str) -> Self {
        Self {
            file: Some(File::from(fd)),
            name,
            lines: Lines::new(),
        }
    }

    /// Reads once; the descriptor was polled, so this does not block.
    fn read(&mut self, log: &mut Log) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let mut buffer = [0; 8 << 10];
        match file.read(&mut buffer) {
            Ok(0) => {
                self.file = None;
                self.finish(log);
            }
            Ok(length) => self
                .lines
                .take(&buffer[..length], |tag, line| log.write(self.name, tag, line)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn finish(&mut self, log: &mut Log) {
        self.lines.finish(|tag, line| log.write(self.name, tag, line));
    }
}

/// The log file.
struct Log {
    path: PathBuf,
    max_size: u64,
    file: Option<File>,
    size: u64,
    entry: Vec<u8>,
}

impl Log {
    fn open(path: PathBuf, max_size: u64) -> Self {
        let mut log = Self {
            path,
            max_size,
            file: None,
            size: 0,
            entry: Vec::new(),
        };
        log.reopen();
        log
    }

    fn reopen(&mut self) {
        if let Some(dir) = self.path.parent() {
            // An error shows at the open.
            std::fs::create_dir_all(dir).ok();
        }
        self.file = OpenOptions::new().create(true).append(true).open(&self.path).ok();
        self.size = self
            .file
            .as_ref()
            .and_then(|file| file.metadata().ok())
            .map_or(0, |metadata| metadata.len());
    }

    fn write(&mut self, stream: &str, tag: Tag, line: &[u8]) {
        self.entry.clear();
        // Writing to a Vec cannot fail.
        let _ = write!(self.entry, "{} {stream} {} ", now(), tag.letter());
        self.entry.extend_from_slice(line);
        self.entry.push(b'\n');
        if self.size > 0 && self.size + self.entry.len() as u64 > self.max_size {
            self.rotate();
        }
        if self.file.is_none() {
            self.reopen();
        }
        let Some(file) = &mut self.file else { return };
        match file.write_all(&self.entry) {
            Ok(()) => self.size += self.entry.len() as u64,
            // The disk is full, say: this line is lost, and the next one tries again.
            Err(_) => self.file = None,
        }
    }

    fn rotate(&mut self) {
        let name = |at: u32| match at {
            0 => self.path.clone(),
            at => with_suffix(&self.path, at),
        };
        for at in (0..FILES - 1).rev() {
            // A file that is not there yet is not an error.
            std::fs::rename(name(at), name(at + 1)).ok();
        }
        self.reopen();
    }
}

fn with_suffix(path: &Path, at: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{at}"));
    PathBuf::from(name)
}

/// `2016-10-06T00:17:09.669794202Z`.
fn now() -> String {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live variable.
    unsafe { libc::clock_gettime(libc::CLOCK_REALTIME, &raw mut time) };
    let (year, month, day) = date(time.tv_sec.div_euclid(86_400));
    let second = time.tv_sec.rem_euclid(86_400);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        time.tv_nsec
    )
}

/// The civil date of a day since 1970-01-01 (Howard Hinnant's days algorithm).
fn date(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use std::{io::Seek as _, os::fd::IntoRawFd as _};

    use super::{lines::MAX_LINE, *};

    fn pipe_with(bytes: &[u8]) -> OwnedFd {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        // SAFETY: the descriptor was just given up by the file.
        unsafe { OwnedFd::from_raw_fd(file.into_raw_fd()) }
    }

    fn logged(stdout: &[u8], stderr: &[u8]) -> Vec<(String, String, usize)> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c/0.log");
        let mut log = Log::open(path.clone(), MAX_FILE);
        copy(
            &mut log,
            [
                Stream::new(pipe_with(stdout), "stdout"),
                Stream::new(pipe_with(stderr), "stderr"),
            ],
        )
        .unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        text.lines()
            .map(|line| {
                let mut parts = line.splitn(4, ' ');
                let time = parts.next().unwrap();
                assert!(time.ends_with('Z') && time.len() == 30, "{time}");
                time.parse::<jiff::Timestamp>().unwrap();
                let stream = parts.next().unwrap().to_owned();
                let tag = parts.next().unwrap().to_owned();
                (stream, tag, parts.next().unwrap().len())
            })
            .collect()
    }

    #[test]
    fn lines_parts_and_an_unfinished_end() {
        let entry = |stream: &str, tag: &str, length| (stream.to_owned(), tag.to_owned(), length);
        assert_eq!(
            logged(b"one\n\nlast", b"err\n"),
            [
                entry("stdout", "F", 3),
                entry("stdout", "F", 0),
                entry("stderr", "F", 3),
                entry("stdout", "F", 4),
            ]
        );
        let long = [vec![b'x'; MAX_LINE * 2 + 5], b"\n".to_vec()].concat();
        assert_eq!(
            logged(&long, b""),
            [
                entry("stdout", "P", MAX_LINE),
                entry("stdout", "P", MAX_LINE),
                entry("stdout", "F", 5)
            ]
        );
        // As long as a part, with and without its newline: a whole line, and no part that waits for another.
        for end in ["", "\n", "\nx"] {
            let exact = [vec![b'x'; MAX_LINE], end.into()].concat();
            let first = logged(&exact, b"")[0].clone();
            assert_eq!(first, entry("stdout", "F", MAX_LINE), "{end:?}");
        }
    }

    #[test]
    fn rotation_keeps_five_files_and_no_line_is_torn() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let mut log = Log::open(path.clone(), 1000);
        for at in 0..200 {
            log.write("stdout", Tag::Full, format!("line {at:03}").as_bytes());
        }
        let mut names: Vec<String> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["0.log", "0.log.1", "0.log.2", "0.log.3", "0.log.4"]);
        let mut lines = Vec::new();
        for name in names.iter().rev() {
            let text = std::fs::read_to_string(dir.path().join(name)).unwrap();
            assert!(text.len() <= 1000);
            lines.extend(
                text.lines()
                    .map(|line| line.rsplit(' ').next().unwrap().parse::<u32>().unwrap()),
            );
        }
        let wanted: Vec<u32> = (200 - u32::try_from(lines.len()).unwrap()..200).collect();
        assert_eq!(lines, wanted, "the last lines, in order, without a gap");
    }

    #[test]
    fn dates() {
        assert_eq!(date(0), (1970, 1, 1));
        assert_eq!(date(11_016), (2000, 2, 29));
        assert_eq!(date(20_778), (2026, 11, 21));
    }

    #[test]
    fn arguments_come_in_pairs_of_a_query() {
        let path = |words: &[&str]| log_path(words.iter().map(OsString::from));
        assert_eq!(path(&["log", "/a/0.log"]), Some("/a/0.log".into()));
        assert_eq!(path(&["x", "y", "log", "/a/0.log"]), Some("/a/0.log".into()));
        assert_eq!(path(&["log", "relative"]), None);
        assert_eq!(path(&[]), None);
    }
}
