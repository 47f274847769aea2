//! The kernel programs, as the build script made them from `ebpf/programs`: one ELF object with all programs, the maps'
//! definitions and their BTF. It is embedded, so an agent carries the programs that belong to it.

/// The object, aligned as an ELF parser wants it.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/orlop-ebpf.o"));

/// A hash of the object: tells whether the pinned programs are these. The word before it makes it easy to find in the binary, for
/// tests that want an agent of another version.
pub const ID: &str = concat!("orlop-ebpf ", env!("ORLOP_BPF_ID"));
