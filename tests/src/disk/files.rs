//! The files behind a faulty disk: what was not synced can be taken back.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// What is to be done, backwards, to make a file what it was at its last sync.
#[derive(Debug)]
enum Undo {
    /// These bytes were here.
    Bytes(u64, Vec<u8>),
    /// The file was this long.
    Length(u64),
}

/// A file of the disk, open for as long as something of it can be taken back.
#[derive(Debug)]
pub struct Backed {
    file: File,
    unsynced: Mutex<Vec<Undo>>,
}

impl Backed {
    /// Reads what is there at an offset, which may be less than asked for.
    pub fn read(&self, offset: u64, size: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; size];
        let mut filled = 0;
        while filled < size {
            let count = self.file.read_at(&mut bytes[filled..], offset + filled as u64)?;
            if count == 0 {
                break;
            }
            filled += count;
        }
        bytes.truncate(filled);
        Ok(bytes)
    }

    /// Writes, and remembers what was there.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut unsynced = self.lock();
        let length = self.file.metadata()?.len();
        let before = self.read(offset, bytes.len())?;
        if offset + bytes.len() as u64 > length {
            unsynced.push(Undo::Length(length));
        }
        if !before.is_empty() {
            unsynced.push(Undo::Bytes(offset, before));
        }
        self.file.write_all_at(bytes, offset)
    }

    /// Cuts or stretches the file, and remembers what it was.
    pub fn set_length(&self, length: u64) -> io::Result<()> {
        let mut unsynced = self.lock();
        let before = self.file.metadata()?.len();
        if length < before {
            let cut = self.read(length, usize::try_from(before - length).map_err(io::Error::other)?)?;
            unsynced.push(Undo::Bytes(length, cut));
        } else if length > before {
            unsynced.push(Undo::Length(before));
        }
        self.file.set_len(length)
    }

    /// What was written stays. The machine below goes on in any case, so nothing has to reach its disk.
    pub fn sync(&self) {
        self.lock().clear();
    }

    /// Makes the file what it was at its last sync.
    pub fn lose(&self) -> io::Result<()> {
        let mut unsynced = self.lock();
        while let Some(undo) = unsynced.pop() {
            match undo {
                Undo::Bytes(offset, bytes) => self.file.write_all_at(&bytes, offset)?,
                Undo::Length(length) => self.file.set_len(length)?,
            }
        }
        Ok(())
    }

    fn is_synced(&self) -> bool {
        self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Undo>> {
        self.unsynced.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All files that are open or not synced, by inode number.
#[derive(Debug, Default)]
pub struct Files(Mutex<HashMap<u64, Arc<Backed>>>);

impl Files {
    /// The file of an inode, opened (to read and write) if it is not.
    pub fn get(&self, inode: u64, open: impl FnOnce() -> io::Result<File>) -> io::Result<Arc<Backed>> {
        let mut files = self.lock();
        if let Some(known) = files.get(&inode) {
            return Ok(Arc::clone(known));
        }
        let backed = Arc::new(Backed {
            file: open()?,
            unsynced: Mutex::default(),
        });
        files.insert(inode, Arc::clone(&backed));
        Ok(backed)
    }

    /// Closes what nobody has open and of which nothing can be taken back.
    pub fn tidy(&self) {
        self.lock()
            .retain(|_, file| Arc::strong_count(file) > 1 || !file.is_synced());
    }

    /// All that was not synced is lost.
    pub fn lose_all(&self) -> io::Result<()> {
        self.lock().values().try_for_each(|file| file.lose())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Backed>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_synced_can_be_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, b"0123456789").unwrap();
        let files = Files::default();
        let open = || File::options().read(true).write(true).open(&path);
        let file = files.get(1, open).unwrap();
        file.write(8, b"abcd").unwrap();
        file.sync();
        file.write(0, b"XX").unwrap();
        file.set_length(4).unwrap();
        file.write(2, b"YYYYYYYYYYYYYYYY").unwrap();
        file.set_length(100).unwrap();
        assert_eq!(std::fs::read(&path).unwrap().len(), 100);
        drop(file);
        files.tidy();
        files.lose_all().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"01234567abcd");
    }
}
