//! Ranges of the arena and dense ids.

use std::collections::{BTreeMap, BTreeSet};

/// Free ranges of `first..end`: best fit, neighbours joined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranges {
    by_start: BTreeMap<u32, u32>,
    by_length: BTreeSet<(u32, u32)>,
}

impl Ranges {
    /// All of it free.
    #[must_use]
    pub fn new(first: u32, end: u32) -> Self {
        let mut ranges = Self {
            by_start: BTreeMap::new(),
            by_length: BTreeSet::new(),
        };
        ranges.release(first, end.saturating_sub(first));
        ranges
    }

    /// Takes the smallest free range that is long enough. Nothing is at 0.
    pub fn allocate(&mut self, length: u32) -> Option<u32> {
        if length == 0 {
            return Some(0);
        }
        let (found, start) = self.by_length.range((length, 0)..).next().copied()?;
        self.remove(start, found);
        self.insert(start + length, found - length);
        Some(start)
    }

    /// Takes this very range; `false` if it is not free.
    pub fn take(&mut self, base: u32, length: u32) -> bool {
        if length == 0 {
            return true;
        }
        let Some((start, found)) = self
            .by_start
            .range(..=base)
            .next_back()
            .map(|(start, found)| (*start, *found))
        else {
            return false;
        };
        let (end, free_end) = (u64::from(base) + u64::from(length), start + found);
        if end > u64::from(free_end) {
            return false;
        }
        self.remove(start, found);
        self.insert(start, base - start);
        self.insert(base + length, free_end - (base + length));
        true
    }

    /// Gives a range back.
    pub fn release(&mut self, base: u32, length: u32) {
        if length == 0 {
            return;
        }
        let (mut start, mut end) = (base, base + length);
        if let Some((before, found)) = self
            .by_start
            .range(..start)
            .next_back()
            .map(|(start, found)| (*start, *found))
            && before + found == start
        {
            self.remove(before, found);
            start = before;
        }
        if let Some(found) = self.by_start.get(&end).copied() {
            self.remove(end, found);
            end += found;
        }
        self.insert(start, end - start);
    }

    /// All free ranges: start and length.
    pub fn free(&self) -> impl Iterator<Item = (u32, u32)> {
        self.by_start.iter().map(|(start, length)| (*start, *length))
    }

    fn insert(&mut self, start: u32, length: u32) {
        if length > 0 {
            self.by_start.insert(start, length);
            self.by_length.insert((length, start));
        }
    }

    fn remove(&mut self, start: u32, length: u32) {
        self.by_start.remove(&start);
        self.by_length.remove(&(length, start));
    }
}

/// Ids `1..limit`, the lowest free one first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ids {
    limit: u32,
    /// Every id from here on is free.
    next: u32,
    /// Free ids below `next`.
    holes: BTreeSet<u32>,
}

impl Ids {
    /// All free.
    #[must_use]
    pub fn new(limit: u32) -> Self {
        Self {
            limit,
            next: 1,
            holes: BTreeSet::new(),
        }
    }

    /// Are `count` free?
    #[must_use]
    pub fn has(&self, count: usize) -> bool {
        self.holes.len() + self.limit.saturating_sub(self.next) as usize >= count
    }

    /// The lowest free id; the caller has asked [`Self::has`].
    pub fn allocate(&mut self) -> u32 {
        self.holes.pop_first().unwrap_or_else(|| {
            self.next += 1;
            self.next - 1
        })
    }

    /// Is it a valid id that nobody has?
    #[must_use]
    pub fn is_free(&self, id: u32) -> bool {
        id > 0 && id < self.limit && (id >= self.next || self.holes.contains(&id))
    }

    /// Takes this very id, which is free.
    pub fn take(&mut self, id: u32) {
        if id >= self.next {
            self.holes.extend(self.next..id);
            self.next = id + 1;
        } else {
            self.holes.remove(&id);
        }
    }

    /// Gives an id back.
    pub fn release(&mut self, id: u32) {
        self.holes.insert(id);
        while self.next > 1 && self.holes.remove(&(self.next - 1)) {
            self.next -= 1;
        }
    }

    /// The highest id in use, 0 if none is.
    #[must_use]
    pub fn highest(&self) -> u32 {
        self.next - 1
    }
}
