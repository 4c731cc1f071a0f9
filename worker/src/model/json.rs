//! Reading small JSON files that somebody else wrote: a size limit, no duplicate keys, and numbers in their ranges.

use std::fs::File;
use std::io::Read;
use std::ops::RangeInclusive;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;

use super::error::LoadError;

/// The largest configuration file that is read, in bytes.
const CONFIG_LIMIT: u64 = 1 << 20;

/// Opens a regular file (through symbolic links), and says how long it is.
pub(super) fn open(path: &Path) -> Result<(File, u64), LoadError> {
    let metadata = std::fs::metadata(path).map_err(|error| LoadError::io(path, &error))?;
    if !metadata.is_file() {
        return Err(LoadError::corrupt(format!("{} is not a regular file", path.display())));
    }
    let file = File::open(path).map_err(|error| LoadError::io(path, &error))?;
    Ok((file, metadata.len()))
}

/// Reads a text file of at most `limit` bytes.
pub(super) fn read_text(path: &Path, limit: u64) -> Result<String, LoadError> {
    let (file, length) = open(path)?;
    let too_long = |length: u64| {
        LoadError::corrupt(format!("{} has {length} bytes, more than the {limit} that are read", path.display()))
    };
    if length > limit {
        return Err(too_long(length));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or(0));
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|error| LoadError::io(path, &error))?;
    if bytes.len() as u64 > limit {
        return Err(too_long(bytes.len() as u64));
    }
    String::from_utf8(bytes).map_err(|_| LoadError::corrupt(format!("{} is not UTF-8 text", path.display())))
}

/// A JSON object in the order of the file; a repeated key is an error.
#[derive(Debug)]
pub(super) struct Object<V = Value>(pub(super) Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Object<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs<V>(std::marker::PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Pairs<V> {
            type Value = Vec<(String, V)>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut pairs = Vec::new();
                let mut seen = std::collections::HashSet::new();
                while let Some((key, value)) = map.next_entry::<String, V>()? {
                    if !seen.insert(key.clone()) {
                        return Err(serde::de::Error::custom(format!("the key {key:?} appears twice")));
                    }
                    pairs.push((key, value));
                }
                Ok(pairs)
            }
        }
        deserializer.deserialize_map(Pairs(std::marker::PhantomData)).map(Object)
    }
}

/// The keys of one configuration file, taken one by one; what is left at the end was not understood.
#[derive(Debug)]
pub(super) struct Fields {
    file: String,
    pairs: Vec<(String, Value)>,
}

impl Fields {
    /// Reads a file that holds one JSON object.
    pub(super) fn read(path: &Path) -> Result<Self, LoadError> {
        Self::parse(&path.display().to_string(), &read_text(path, CONFIG_LIMIT)?)
    }

    /// Reads a text that holds one JSON object; `file` is what errors call it.
    pub(super) fn parse(file: &str, text: &str) -> Result<Self, LoadError> {
        let Object(pairs) = serde_json::from_str::<Object>(text)
            .map_err(|error| LoadError::corrupt(format!("{file} is not valid: {error}")))?;
        Ok(Self { file: file.to_owned(), pairs })
    }

    /// The value of a key; `Some(Null)` when the file says `null`.
    pub(super) fn take(&mut self, key: &str) -> Option<Value> {
        let place = self.pairs.iter().position(|(name, _)| name == key)?;
        Some(self.pairs.remove(place).1)
    }

    /// The value of a key, which stays.
    pub(super) fn peek(&self, key: &str) -> Option<&Value> {
        self.pairs.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    /// The value of a key that `null` and absence leave unset.
    pub(super) fn take_set(&mut self, key: &str) -> Option<Value> {
        self.take(key).filter(|value| !value.is_null())
    }

    /// A whole number in `range`.
    pub(super) fn count(&mut self, key: &str, range: RangeInclusive<u64>) -> Result<Option<usize>, LoadError> {
        let Some(value) = self.take_set(key) else { return Ok(None) };
        match value.as_u64() {
            Some(number) if range.contains(&number) => Ok(Some(number as usize)),
            _ => Err(self.out_of_range(key, &value, &format!("a whole number in {}..={}", range.start(), range.end()))),
        }
    }

    /// A whole number in `range` without which the file is useless.
    pub(super) fn required(&mut self, key: &str, range: RangeInclusive<u64>) -> Result<usize, LoadError> {
        self.count(key, range)?.ok_or_else(|| LoadError::corrupt(format!("{} has no {key}", self.file)))
    }

    /// A finite number in `range`.
    pub(super) fn number(&mut self, key: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, LoadError> {
        let Some(value) = self.take_set(key) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(self.out_of_range(key, &value, &format!("a number in {:?}..={:?}", range.start(), range.end()))),
        }
    }

    /// `true` or `false`.
    pub(super) fn flag(&mut self, key: &str) -> Result<Option<bool>, LoadError> {
        let Some(value) = self.take_set(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.out_of_range(key, &value, "true or false"))
    }

    /// Token ids: one, or a list of at most 64, each below `vocab`.
    pub(super) fn token_ids(&mut self, key: &str, vocab: usize) -> Result<Vec<u32>, LoadError> {
        let Some(value) = self.take_set(key) else { return Ok(Vec::new()) };
        let list = match &value {
            Value::Array(list) if list.len() <= 64 => list.clone(),
            Value::Array(_) => return Err(self.out_of_range(key, &value, "a list of at most 64 token ids")),
            single => vec![single.clone()],
        };
        list.iter()
            .map(|id| match id.as_u64() {
                Some(id) if id < vocab as u64 => Ok(id as u32),
                _ => Err(self.out_of_range(key, id, &format!("a token id below vocab_size = {vocab}"))),
            })
            .collect()
    }

    /// An object, taken apart in turn.
    pub(super) fn object(&mut self, key: &str) -> Result<Option<Fields>, LoadError> {
        match self.take_set(key) {
            None => Ok(None),
            Some(Value::Object(map)) => {
                Ok(Some(Fields { file: format!("{}: {key}", self.file), pairs: map.into_iter().collect() }))
            }
            Some(value) => Err(self.out_of_range(key, &value, "an object")),
        }
    }

    /// The error for a key whose value cannot be.
    pub(super) fn out_of_range(&self, key: &str, value: &Value, wanted: &str) -> LoadError {
        LoadError::corrupt(self.sentence(key, value, wanted))
    }

    /// The error for a key that asks for something this worker does not compute.
    pub(super) fn unsupported(&self, key: &str, value: &Value, wanted: &str) -> LoadError {
        LoadError::unsupported(format!("{}; this worker computes nothing else", self.sentence(key, value, wanted)))
    }

    fn sentence(&self, key: &str, value: &Value, wanted: &str) -> String {
        let mut shown = value.to_string();
        if shown.len() > 80 {
            shown.truncate(shown.floor_char_boundary(80));
            shown.push('…');
        }
        format!("{}: {key} is {shown}, must be {wanted}", self.file)
    }

    /// The keys that nobody took, with their values.
    pub(super) fn rest(&mut self) -> Vec<(String, Value)> {
        std::mem::take(&mut self.pairs)
    }

    /// The names of the keys that nobody took.
    pub(super) fn left(self) -> Vec<String> {
        self.pairs.into_iter().map(|(key, _)| key).collect()
    }
}
