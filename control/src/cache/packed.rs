//! Encoded objects, packed: those of one kind have much in common (their field names' tags, `apiVersion`, reasons, the names of
//! components, parts of timestamps), and a cluster has tens of thousands of them. LZ4 against a dictionary of the first ones of the kind.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use lz4_flex::block::{compress_prepend_size_with_dict, decompress_size_prepended_with_dict};

/// Bytes of a dictionary, at least. Each packing reads all of it.
const DICTIONARY: usize = 4096;
/// Bytes that one value gives to it, at most.
const SAMPLE: usize = 768;

/// Packs the values of one kind.
#[derive(Debug, Default)]
pub(super) struct Packer {
    samples: Mutex<Vec<u8>>,
    dictionary: OnceLock<Arc<Vec<u8>>>,
}

/// A value, packed where that makes it smaller.
#[derive(Debug)]
pub(super) struct Packed {
    bytes: Box<[u8]>,
    /// What it was packed with; `None`: it is as it was.
    dictionary: Option<Arc<Vec<u8>>>,
}

impl Packer {
    /// The first values stay as they are: they become the dictionary.
    pub(super) fn pack(&self, value: &[u8]) -> Packed {
        let Some(dictionary) = self.dictionary.get() else {
            self.learn(value);
            return Packed::plain(value);
        };
        let packed = compress_prepend_size_with_dict(value, dictionary);
        if packed.len() >= value.len() {
            return Packed::plain(value);
        }
        Packed {
            bytes: packed.into(),
            dictionary: Some(dictionary.clone()),
        }
    }

    fn learn(&self, value: &[u8]) {
        let mut samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        samples.extend_from_slice(&value[..value.len().min(SAMPLE)]);
        if samples.len() >= DICTIONARY {
            let mut samples = std::mem::take(&mut *samples);
            samples.shrink_to_fit();
            self.dictionary.get_or_init(|| Arc::new(samples));
        }
    }
}

impl Packed {
    /// A value as it is.
    pub(super) fn plain(value: &[u8]) -> Self {
        Self {
            bytes: value.into(),
            dictionary: None,
        }
    }

    /// How many bytes the value has.
    pub(super) fn len(&self) -> usize {
        match (&self.dictionary, self.bytes.first_chunk()) {
            (Some(_), Some(size)) => u32::from_le_bytes(*size) as usize,
            _ => self.bytes.len(),
        }
    }

    /// Gives the value to `read`.
    ///
    /// # Panics
    /// Never: what was packed in memory can be unpacked.
    pub(super) fn with<R>(&self, read: impl FnOnce(&[u8]) -> R) -> R {
        match &self.dictionary {
            None => read(&self.bytes),
            Some(dictionary) => {
                let value = decompress_size_prepended_with_dict(&self.bytes, dictionary);
                read(&value.expect("what was packed can be unpacked"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn taught() -> Packer {
        let packer = Packer::default();
        while packer.dictionary.get().is_none() {
            packer.pack(b"Successfully assigned default/pod-1 to node-1; kubelet; Started container main");
        }
        packer
    }

    #[test]
    fn values_of_a_kind_become_smaller() {
        let value = b"Successfully assigned default/pod-20 to node-4711; kubelet; Started container main";
        let packed = taught().pack(value);
        assert!(packed.bytes.len() < value.len() / 2, "{} bytes", packed.bytes.len());
        packed.with(|unpacked| assert_eq!(unpacked, value));
        assert_eq!(packed.len(), value.len());
        let plain = Packer::default().pack(value);
        assert!(plain.dictionary.is_none(), "there is nothing to compare it with");
        plain.with(|unpacked| assert_eq!(unpacked, value));
        assert_eq!(plain.len(), value.len());
    }

    #[test]
    fn long_values_do_not_fill_the_dictionary_alone() {
        let packer = Packer::default();
        for _ in 0..5 {
            packer.pack(&[7; 1 << 20]);
            assert!(packer.dictionary.get().is_none());
        }
        packer.pack(&[7; 1 << 20]);
        assert!(packer.dictionary.get().unwrap().len() < DICTIONARY + SAMPLE);
    }

    proptest! {
        #[test]
        fn every_value_comes_back(value in prop::collection::vec(any::<u8>(), 0..2000), repeated in 0..5_usize) {
            let packer = taught();
            let value = value.repeat(repeated);
            packer.pack(&value).with(|unpacked| assert_eq!(unpacked, value));
        }
    }
}
