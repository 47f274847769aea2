//! The arena of backends, mapped into memory: a slot is written with plain stores.
//!
//! Mapped in windows, when one is first needed: a mapping of a map counts as memory of ours whether it is used or not, and an arena has
//! room for many more slots than most nodes need.

use std::{
    io,
    num::NonZeroUsize,
    os::fd::{AsFd, OwnedFd},
    ptr::NonNull,
    sync::{
        OnceLock,
        atomic::{Ordering, fence},
    },
};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use orlop_ebpf_abi::{Slot, SlotState};

/// Slots of a window: 256 KiB.
const WINDOW: u32 = 1 << 14;

/// The mapped arena.
pub struct Arena {
    map: OwnedFd,
    slots: u32,
    windows: Box<[OnceLock<Window>]>,
}

impl Arena {
    /// Maps the array `map` of so many slots, as they are used.
    ///
    /// # Errors
    /// The descriptor cannot be copied.
    pub fn map(map: impl AsFd, slots: u32) -> io::Result<Self> {
        Ok(Self {
            map: map.as_fd().try_clone_to_owned()?,
            slots,
            windows: (0..slots.div_ceil(WINDOW)).map(|_| OnceLock::new()).collect(),
        })
    }

    /// Writes slots one after the other from `base` on. What lies beyond the arena is left out; the planner never does that.
    ///
    /// # Errors
    /// mmap(2)'s; then some of them may be written.
    pub fn write(&self, base: u32, slots: &[Slot]) -> io::Result<()> {
        for (index, slot) in (base..self.slots).zip(slots) {
            self.window(index / WINDOW)?.write(index % WINDOW, encode(slot));
        }
        // The frontend that leads here is written by a system call; nothing may move behind it.
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Zeroes a range; returns how many slots were not zero.
    ///
    /// # Errors
    /// mmap(2)'s; then some of them may be zeroed.
    pub fn clear(&self, base: u32, count: u32) -> io::Result<u32> {
        let end = base.saturating_add(count).min(self.slots);
        let (mut index, mut cleared) = (base, 0);
        while index < end {
            let (number, first) = (index / WINDOW, index % WINDOW);
            let length = (end - index).min(WINDOW - first);
            cleared += match self.windows[number as usize].get() {
                Some(window) => window.clear(first, length),
                // Nobody needs it: not for longer than this.
                None => self.map_window(number)?.clear(first, length),
            };
            index += length;
        }
        fence(Ordering::SeqCst);
        Ok(cleared)
    }

    /// Maps what of these slots is within the arena, so that [`Self::read`] can read them.
    ///
    /// # Errors
    /// The kernel's.
    pub fn ensure(&self, base: u32, count: u32) -> io::Result<()> {
        let end = base.saturating_add(count).min(self.slots);
        if base < end {
            for number in base / WINDOW..=(end - 1) / WINDOW {
                self.window(number)?;
            }
        }
        Ok(())
    }

    /// Reads a slot. `None` beyond the arena, if its state is none that we write, or where it cannot be mapped.
    #[must_use]
    pub fn read(&self, index: u32) -> Option<Slot> {
        let window = (index < self.slots)
            .then(|| self.window(index / WINDOW).ok())
            .flatten()?;
        decode(window.read(index % WINDOW))
    }

    /// How many slots there are.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.slots
    }

    fn window(&self, number: u32) -> io::Result<&Window> {
        let place = &self.windows[number as usize];
        if let Some(window) = place.get() {
            return Ok(window);
        }
        let window = self.map_window(number)?;
        Ok(place.get_or_init(|| window))
    }

    fn map_window(&self, number: u32) -> io::Result<Window> {
        let first = number * WINDOW;
        let slots = (self.slots - first).min(WINDOW);
        let bytes = (slots as usize * size_of::<Slot>()).next_multiple_of(4096);
        let bytes = NonZeroUsize::new(bytes).ok_or_else(|| io::Error::other("a window without slots"))?;
        let offset = i64::from(first) * i64::try_from(size_of::<Slot>()).map_err(io::Error::other)?;
        // SAFETY: a new shared mapping where the kernel likes; nobody truncates a map.
        let memory = unsafe {
            mmap(
                None,
                bytes,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                &self.map,
                offset,
            )
        }?;
        Ok(Window {
            memory: memory.cast(),
            bytes,
        })
    }
}

/// Some slots, mapped. Two words each.
struct Window {
    memory: NonNull<u64>,
    bytes: NonZeroUsize,
}

// SAFETY: plain shared memory; all access is by volatile words, and only the holder of the dataplane's lock writes.
unsafe impl Send for Window {}
// SAFETY: as above; reading while another thread writes gives old or new words.
unsafe impl Sync for Window {}

impl Window {
    fn write(&self, index: u32, words: [u64; 2]) {
        let slot = self.slot(index);
        // SAFETY: `slot` gives a slot of this mapping.
        unsafe {
            slot.write_volatile(words[0]);
            slot.add(1).write_volatile(words[1]);
        }
    }

    fn read(&self, index: u32) -> [u64; 2] {
        let slot = self.slot(index);
        // SAFETY: as above.
        unsafe { [slot.read_volatile(), slot.add(1).read_volatile()] }
    }

    fn clear(&self, first: u32, length: u32) -> u32 {
        let mut cleared = 0;
        for index in first..first + length {
            if self.read(index) != [0, 0] {
                self.write(index, [0, 0]);
                cleared += 1;
            }
        }
        cleared
    }

    fn slot(&self, index: u32) -> *mut u64 {
        let offset = index as usize * 2;
        assert!(
            (offset + 2) * 8 <= self.bytes.get(),
            "slot {index} is beyond its window"
        );
        // SAFETY: within the mapping, as was just asserted.
        unsafe { self.memory.as_ptr().add(offset) }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: mapped by `map_window` with this length, and not used any more.
        let _still_mapped_until_exit = unsafe { munmap(self.memory.cast(), self.bytes.get()) };
    }
}

fn encode(slot: &Slot) -> [u64; 2] {
    let mut bytes = [0_u8; 16];
    bytes[0..4].copy_from_slice(&slot.address);
    bytes[4..6].copy_from_slice(&slot.port.to_ne_bytes());
    bytes[6] = slot.state as u8;
    bytes[8..12].copy_from_slice(&slot.generation.to_ne_bytes());
    bytes[12..16].copy_from_slice(&slot.backend.to_ne_bytes());
    let (first, second) = bytes.split_at(8);
    [first, second].map(|half| {
        let mut word = [0; 8];
        word.copy_from_slice(half);
        u64::from_ne_bytes(word)
    })
}

/// A slot as the map has it; `None` if its state is none that we write.
#[must_use]
pub fn decode(words: [u64; 2]) -> Option<Slot> {
    let (first, second) = (words[0].to_ne_bytes(), words[1].to_ne_bytes());
    let state = match first[6] {
        0 => SlotState::Free,
        1 => SlotState::Ready,
        2 => SlotState::Terminating,
        _ => return None,
    };
    Some(Slot {
        address: [first[0], first[1], first[2], first[3]],
        port: u16::from_ne_bytes([first[4], first[5]]),
        state,
        reserved: first[7],
        generation: u32::from_ne_bytes([second[0], second[1], second[2], second[3]]),
        backend: u32::from_ne_bytes([second[4], second[5], second[6], second[7]]),
    })
}
