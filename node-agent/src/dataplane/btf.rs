//! As much of BTF as is needed: offsets of the kernel's struct members, and what a map's key and value look like.

use std::{collections::HashMap, fmt::Write as _, io};

/// No shape is longer, in bytes: structs may name each other many times over.
const MAX_SHAPE: usize = 64 << 10;
/// Types that stand for another one after the other, and structs without names in each other: no more of them are followed.
const MAX_CHAIN: usize = 32;
/// How many members are looked at for one.
const MAX_MEMBERS: usize = 1 << 16;

/// A parsed BTF object.
pub struct Btf<'a> {
    bytes: &'a [u8],
    strings: usize,
    /// Offset of each type; index 0 is `void`.
    types: Vec<usize>,
}

mod kind {
    pub const INT: u32 = 1;
    pub const ARRAY: u32 = 3;
    pub const STRUCT: u32 = 4;
    pub const UNION: u32 = 5;
    pub const ENUM: u32 = 6;
    pub const TYPEDEF: u32 = 8;
    pub const VOLATILE: u32 = 9;
    pub const CONST: u32 = 10;
    pub const RESTRICT: u32 = 11;
    pub const TYPE_TAG: u32 = 18;
}

impl<'a> Btf<'a> {
    /// Finds the types.
    ///
    /// # Errors
    /// It is no BTF, or cut off.
    pub fn parse(bytes: &'a [u8]) -> io::Result<Self> {
        let word = |offset: usize| word(bytes, offset);
        if bytes.len() < 24 || bytes[0..2] != 0xeb9f_u16.to_ne_bytes() {
            return Err(io::Error::other("no BTF"));
        }
        let header = word(4)?;
        let (start, length, strings) = (header + word(8)?, word(12)?, header + word(16)?);
        let end = start + length;
        let mut types = vec![0];
        let mut offset = start;
        while offset < end {
            types.push(offset);
            let info = word(offset + 4)?;
            let (kind, members) = ((info >> 24) & 0x1f, info & 0xffff);
            offset += 12
                + match kind {
                    1 | 14 | 17 => 4,
                    3 => 12,
                    4 | 5 | 15 | 19 => 12 * members,
                    6 | 13 => 8 * members,
                    _ => 0,
                };
        }
        Ok(Self { bytes, strings, types })
    }

    /// Byte offset of a member of a struct, through anonymous ones too.
    #[must_use]
    pub fn member_offset(&self, structure: &str, member: &str) -> Option<u32> {
        let mut left = MAX_MEMBERS;
        (1..self.types.len())
            .filter(|id| self.kind(*id) == kind::STRUCT && self.name(self.types[*id]) == structure)
            .find_map(|id| self.find_member(id, member, 0, &mut left))
    }

    fn find_member(&self, structure: usize, member: &str, depth: usize, left: &mut usize) -> Option<u32> {
        let flagged = word(self.bytes, self.types[structure] + 4).ok()? >> 31 == 1;
        self.members(structure).find_map(|(name, type_id, bits)| {
            *left = left.checked_sub(1)?;
            let bits = if flagged { bits & 0x00ff_ffff } else { bits };
            if name == member {
                return Some(bits / 8);
            }
            let inner = self.resolve(type_id);
            let anonymous =
                name.is_empty() && depth < MAX_CHAIN && matches!(self.kind(inner), kind::STRUCT | kind::UNION);
            anonymous
                .then(|| self.find_member(inner, member, depth + 1, left))
                .flatten()
                .map(|inner| bits / 8 + inner)
        })
    }

    /// A type in one line, as [`super::layout`] compares it: fields with offsets and sizes, names of states.
    #[must_use]
    pub fn shape(&self, id: u32) -> String {
        let mut text = String::new();
        self.write_shape(id as usize, &mut text, 0);
        text
    }

    fn write_shape(&self, id: usize, text: &mut String, depth: u32) {
        let id = self.resolve(id);
        let within = depth < 8 && text.len() < MAX_SHAPE;
        let Some(offset) = self.types.get(id).copied().filter(|offset| *offset != 0 && within) else {
            text.push('?');
            return;
        };
        match self.kind(id) {
            kind::INT => {
                let _infallible = write!(text, "u{}", 8 * self.size(offset));
            }
            kind::ARRAY => {
                text.push('[');
                self.write_shape(word(self.bytes, offset + 12).unwrap_or(0), text, depth + 1);
                let _infallible = write!(text, ";{}]", word(self.bytes, offset + 20).unwrap_or(0));
            }
            kind::STRUCT => {
                text.push('{');
                for (index, (name, type_id, bits)) in self.members(id).enumerate() {
                    if text.len() >= MAX_SHAPE {
                        break;
                    }
                    let _infallible = write!(text, "{}{name}@{}:", if index == 0 { "" } else { " " }, bits / 8);
                    self.write_shape(type_id, text, depth + 1);
                }
                text.push('}');
            }
            kind::ENUM => {
                let _infallible = write!(text, "enum{}", 8 * self.size(offset));
                let mut values: Vec<_> = self.enumerators(offset).collect();
                values.sort_by_key(|(_, value)| *value);
                for (name, value) in values {
                    if text.len() >= MAX_SHAPE {
                        break;
                    }
                    let _infallible = write!(text, " {name}={value}");
                }
            }
            _ => text.push('?'),
        }
    }

    fn resolve(&self, mut id: usize) -> usize {
        for _ in 0..MAX_CHAIN {
            let stands_for_another = matches!(
                self.kind(id),
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG
            );
            if !stands_for_another {
                return id;
            }
            id = word(self.bytes, self.types[id] + 8).unwrap_or(0);
        }
        0
    }

    fn kind(&self, id: usize) -> u32 {
        match self.types.get(id) {
            Some(offset) if *offset != 0 => {
                u32::try_from((word(self.bytes, offset + 4).unwrap_or(0) >> 24) & 0x1f).unwrap_or(0)
            }
            _ => 0,
        }
    }

    fn size(&self, offset: usize) -> usize {
        word(self.bytes, offset + 8).unwrap_or(0)
    }

    fn name(&self, offset: usize) -> &str {
        let start = self.strings + word(self.bytes, offset).unwrap_or(0);
        let rest = self.bytes.get(start..).unwrap_or(&[]);
        let length = rest.iter().position(|byte| *byte == 0).unwrap_or(0);
        std::str::from_utf8(&rest[..length]).unwrap_or("")
    }

    fn members(&self, id: usize) -> impl Iterator<Item = (&str, usize, u32)> {
        let offset = self.types[id];
        let count = word(self.bytes, offset + 4).unwrap_or(0) & 0xffff;
        (0..count).map(move |index| {
            let member = offset + 12 + 12 * index;
            let bits = u32::try_from(word(self.bytes, member + 8).unwrap_or(0)).unwrap_or(0);
            (self.name(member), word(self.bytes, member + 4).unwrap_or(0), bits)
        })
    }

    fn enumerators(&self, offset: usize) -> impl Iterator<Item = (&str, usize)> {
        let count = word(self.bytes, offset + 4).unwrap_or(0) & 0xffff;
        (0..count).map(move |index| {
            let member = offset + 12 + 8 * index;
            (self.name(member), word(self.bytes, member + 4).unwrap_or(0))
        })
    }
}

fn word(bytes: &[u8], offset: usize) -> io::Result<usize> {
    let slice = bytes
        .get(offset..offset + 4)
        .ok_or_else(|| io::Error::other("BTF is cut off"))?;
    let mut word = [0; 4];
    word.copy_from_slice(slice);
    Ok(u32::from_ne_bytes(word) as usize)
}

/// The offsets that `sched_switch` needs, by the program's names for them.
///
/// # Errors
/// The kernel has no BTF, or a member is not there.
pub fn kernel_offsets() -> io::Result<HashMap<&'static str, u32>> {
    let bytes = std::fs::read("/sys/kernel/btf/vmlinux")?;
    let btf = Btf::parse(&bytes)?;
    [
        ("CGROUPS_OFFSET", "task_struct", "cgroups"),
        ("DFL_CGRP_OFFSET", "css_set", "dfl_cgrp"),
        ("KN_OFFSET", "cgroup", "kn"),
        ("ID_OFFSET", "kernfs_node", "id"),
    ]
    .into_iter()
    .map(|(global, structure, member)| {
        let offset = btf
            .member_offset(structure, member)
            .ok_or_else(|| io::Error::other(format!("the kernel's BTF has no {structure}.{member}")))?;
        Ok((global, offset))
    })
    .collect()
}
