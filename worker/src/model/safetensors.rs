//! The safetensors header: an untrusted description of a file, checked before anything that it claims is believed.

use std::collections::HashSet;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use super::dtype::Dtype;
use super::error::LoadError;
use super::json::{self, Object};

/// The longest header that is read, in bytes; a 300B checkpoint's shards have less than one megabyte each.
const HEADER_LIMIT: u64 = 32 << 20;
/// The most tensors that one file may have.
const TENSOR_LIMIT: usize = 1 << 18;
/// The most dimensions that a tensor may have.
const RANK_LIMIT: usize = 8;

/// How a tensor's numbers are stored.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stored {
    /// Little-endian IEEE single precision.
    F32,
    /// Little-endian bfloat16.
    Bf16,
    /// Little-endian IEEE half precision.
    F16,
    /// Another safetensors format, which no weight may have; with its bits per element.
    Other(&'static str, u8),
}

/// The other formats of the safetensors specification, with their bits per element.
const OTHERS: [(&str, u8); 19] = [
    ("BOOL", 8),
    ("C64", 64),
    ("F4", 4),
    ("F64", 64),
    ("F6_E2M3", 6),
    ("F6_E3M2", 6),
    ("F8_E4M3", 8),
    ("F8_E4M3FNUZ", 8),
    ("F8_E5M2", 8),
    ("F8_E5M2FNUZ", 8),
    ("F8_E8M0", 8),
    ("I16", 16),
    ("I32", 32),
    ("I64", 64),
    ("I8", 8),
    ("U16", 16),
    ("U32", 32),
    ("U64", 64),
    ("U8", 8),
];

impl Stored {
    fn parse(name: &str) -> Option<Self> {
        match name {
            "F32" => Some(Stored::F32),
            "BF16" => Some(Stored::Bf16),
            "F16" => Some(Stored::F16),
            _ => OTHERS.iter().find(|(other, _)| *other == name).map(|&(name, bits)| Stored::Other(name, bits)),
        }
    }

    fn bits(self) -> u64 {
        match self {
            Stored::F32 => 32,
            Stored::Bf16 | Stored::F16 => 16,
            Stored::Other(_, bits) => u64::from(bits),
        }
    }

    /// The weight format this is, if it is one.
    pub fn dtype(self) -> Option<Dtype> {
        match self {
            Stored::F32 => Some(Dtype::Float32),
            Stored::Bf16 => Some(Dtype::Bfloat16),
            Stored::F16 => Some(Dtype::Float16),
            Stored::Other(..) => None,
        }
    }
}

impl fmt::Display for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stored::F32 => "F32",
            Stored::Bf16 => "BF16",
            Stored::F16 => "F16",
            Stored::Other(name, _) => name,
        })
    }
}

/// Widens little-endian numbers of a weight format and hands them on one by one.
pub(super) fn widen(dtype: Dtype, bytes: &[u8]) -> impl Iterator<Item = f32> + '_ {
    bytes.chunks_exact(dtype.bytes()).map(move |chunk| match (dtype, chunk) {
        (Dtype::Float32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
        (Dtype::Bfloat16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
        (Dtype::Float16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
        _ => f32::NAN,
    })
}

/// One tensor of a file.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Tensor {
    /// Its name, unique in the file.
    pub name: String,
    /// How its numbers are stored.
    pub stored: Stored,
    /// Its dimensions, slowest first.
    pub shape: Vec<usize>,
    /// Where its bytes begin in the file.
    pub offset: u64,
    /// Bytes; the shape's elements times their size.
    pub bytes: u64,
}

/// A file's header: what it says about its tensors, in the order of their bytes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Header {
    /// The file.
    pub path: PathBuf,
    /// Its tensors; they fill the file after the header without gap or overlap.
    pub tensors: Vec<Tensor>,
}

/// What a header says about one tensor.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Shape,
    data_offsets: (u64, u64),
}

/// At most [`RANK_LIMIT`] dimensions.
struct Shape(Vec<u64>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Dimensions;
        impl<'de> Visitor<'de> for Dimensions {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {RANK_LIMIT} dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Shape, A::Error> {
                let mut shape = Vec::new();
                while let Some(size) = list.next_element()? {
                    if shape.len() == RANK_LIMIT {
                        return Err(A::Error::invalid_length(RANK_LIMIT + 1, &self));
                    }
                    shape.push(size);
                }
                Ok(Shape(shape))
            }
        }
        deserializer.deserialize_seq(Dimensions)
    }
}

/// A whole header; a tensor that is named twice stays twice.
struct Entries(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from tensor names to descriptions")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<Object<String>>()?;
                    } else if entries.len() == TENSOR_LIMIT {
                        return Err(A::Error::custom(format!("more than {TENSOR_LIMIT} tensors")));
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

impl Header {
    /// Reads and checks the header of a file.
    ///
    /// # Errors
    /// [`LoadError`] that names the file and, where it can, the tensor.
    pub fn read(path: &Path) -> Result<Self, LoadError> {
        let shown = path.display();
        let (mut file, length) = json::open(path)?;
        let mut first = [0; 8];
        if length < 8 {
            return Err(LoadError::corrupt(format!(
                "{shown} has {length} bytes and is no safetensors file: copy it again"
            )));
        }
        file.read_exact(&mut first).map_err(|error| LoadError::io(path, &error))?;
        let claimed = u64::from_le_bytes(first);
        if claimed > HEADER_LIMIT || claimed > length - 8 {
            return Err(LoadError::corrupt(format!(
                "{shown} claims a header of {claimed} bytes in a file of {length}: it is cut short or no safetensors file"
            )));
        }
        let mut text = vec![0; claimed as usize];
        file.read_exact(&mut text).map_err(|error| LoadError::io(path, &error))?;
        let tensors =
            parse(&text, 8 + claimed, length).map_err(|what| LoadError::corrupt(format!("{shown}: {what}")))?;
        Ok(Self { path: path.to_owned(), tensors })
    }
}

/// Checks a header's text: `start` is where the data begins in a file of `length` bytes. Errors are the end of a
/// sentence that begins with the file's name.
pub fn parse(text: &[u8], start: u64, length: u64) -> Result<Vec<Tensor>, String> {
    let text = std::str::from_utf8(text).map_err(|_| "the header is not UTF-8 text".to_owned())?;
    if !text.starts_with('{') {
        return Err("the header does not begin with '{'".to_owned());
    }
    let Entries(entries) = serde_json::from_str(text).map_err(|error| format!("the header is not valid: {error}"))?;
    let mut seen = HashSet::new();
    if let Some((name, _)) = entries.iter().find(|(name, _)| !seen.insert(name.as_str())) {
        return Err(format!("the header names the tensor {name:?} twice"));
    }
    let mut tensors =
        entries.into_iter().map(|(name, entry)| tensor(name, entry, start)).collect::<Result<Vec<_>, _>>()?;
    tensors.sort_by_key(|tensor| (tensor.offset, tensor.bytes));
    let mut end = start;
    for tensor in &tensors {
        if tensor.offset != end {
            let what = if tensor.offset < end { "overlaps the tensor before it" } else { "leaves a gap before it" };
            return Err(format!("tensor {:?} {what}: its bytes begin at {}, not {end}", tensor.name, tensor.offset));
        }
        end += tensor.bytes;
        if end > length {
            return Err(format!(
                "tensor {:?} ends at byte {end} of a file of {length}: the file is cut short, copy it again",
                tensor.name
            ));
        }
    }
    if end != length {
        return Err(format!("the tensors end at byte {end} of a file of {length}: the rest belongs to none"));
    }
    Ok(tensors)
}

fn tensor(name: String, entry: Entry, start: u64) -> Result<Tensor, String> {
    let stored = Stored::parse(&entry.dtype)
        .ok_or_else(|| format!("tensor {name:?} has the unknown dtype {:?}", entry.dtype))?;
    let (begin, end) = entry.data_offsets;
    let Shape(shape) = entry.shape;
    let bytes = shape
        .iter()
        .try_fold(1u64, |product, &size| product.checked_mul(size))
        .and_then(|elements| elements.checked_mul(stored.bits()))
        .filter(|bits| bits.is_multiple_of(8))
        .map(|bits| bits / 8);
    match (bytes, end.checked_sub(begin), start.checked_add(begin), start.checked_add(end)) {
        (Some(bytes), Some(length), Some(offset), Some(_)) if bytes == length => {
            let shape = shape.iter().map(|&size| size as usize).collect();
            Ok(Tensor { name, stored, shape, offset, bytes })
        }
        _ => {
            Err(format!("tensor {name:?} of shape {shape:?} and dtype {stored} cannot lie at the bytes {begin}..{end}"))
        }
    }
}

#[cfg(test)]
mod tests;
