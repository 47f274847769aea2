//! The arena of backends, mapped into memory: a slot is written with plain stores.

use std::{
    io,
    num::NonZeroUsize,
    os::fd::AsFd,
    ptr::NonNull,
    sync::atomic::{Ordering, fence},
};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use orlop_ebpf_abi::{Slot, SlotState};

/// The mapped arena.
pub struct Arena {
    memory: NonNull<u64>,
    bytes: NonZeroUsize,
    slots: u32,
}

// SAFETY: plain shared memory; all access is by volatile words, and only the holder of the dataplane's lock writes.
unsafe impl Send for Arena {}
// SAFETY: as above; reading while another thread writes gives old or new words.
unsafe impl Sync for Arena {}

impl Arena {
    /// Maps the array `map` of so many slots.
    ///
    /// # Errors
    /// mmap(2)'s.
    pub fn map(map: impl AsFd, slots: u32) -> io::Result<Self> {
        let bytes = (slots as usize * size_of::<Slot>()).next_multiple_of(4096);
        let bytes = NonZeroUsize::new(bytes).ok_or_else(|| io::Error::other("an arena without slots"))?;
        // SAFETY: a new shared mapping where the kernel likes; nobody truncates a map.
        let memory = unsafe {
            mmap(
                None,
                bytes,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                map,
                0,
            )
        }?;
        Ok(Self {
            memory: memory.cast(),
            bytes,
            slots,
        })
    }

    /// Writes slots one after the other from `base` on. What lies beyond the arena is left out; the planner never does that.
    pub fn write(&self, base: u32, slots: &[Slot]) {
        for (index, slot) in (base..self.slots).zip(slots) {
            let words = encode(slot);
            // SAFETY: index is below the number of slots, each of which is two words.
            unsafe {
                self.memory.as_ptr().add(index as usize * 2).write_volatile(words[0]);
                self.memory
                    .as_ptr()
                    .add(index as usize * 2 + 1)
                    .write_volatile(words[1]);
            }
        }
        // The frontend that leads here is written by a system call; nothing may move behind it.
        fence(Ordering::SeqCst);
    }

    /// Zeroes a range; returns how many slots were not zero.
    pub fn clear(&self, base: u32, count: u32) -> u32 {
        let mut cleared = 0;
        for index in base..base.saturating_add(count).min(self.slots) {
            if self.words(index) != [0, 0] {
                self.write(index, &[Slot::FREE]);
                cleared += 1;
            }
        }
        cleared
    }

    /// Reads a slot. `None` beyond the arena, or if its state is none that we write.
    #[must_use]
    pub fn read(&self, index: u32) -> Option<Slot> {
        (index < self.slots).then(|| decode(self.words(index))).flatten()
    }

    /// How many slots there are.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.slots
    }

    fn words(&self, index: u32) -> [u64; 2] {
        // SAFETY: the callers have checked the index.
        unsafe {
            let slot = self.memory.as_ptr().add(index as usize * 2);
            [slot.read_volatile(), slot.add(1).read_volatile()]
        }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and not used any more.
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

fn decode(words: [u64; 2]) -> Option<Slot> {
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
