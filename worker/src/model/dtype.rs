//! Number formats of weights.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A number format of weights and of the key-value cache.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// IEEE single precision.
    Float32,
    /// The upper half of a single.
    Bfloat16,
    /// IEEE half precision.
    Float16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::Float32 => 4,
            Dtype::Bfloat16 | Dtype::Float16 => 2,
        }
    }

    /// The format of a key-value cache beside weights of this format, on the CPU, where
    /// [`LoadOptions::kv_cache_dtype`](super::LoadOptions::kv_cache_dtype) does not choose another. Two-byte caches are float16: keys
    /// and values are computed in single precision, and bfloat16 would keep an eighth of what float16 does in the same bytes.
    pub fn kv_cache(self) -> Dtype {
        match self {
            Dtype::Float32 => Dtype::Float32,
            Dtype::Bfloat16 | Dtype::Float16 => Dtype::Float16,
        }
    }

    /// The name in config files and flags.
    pub fn as_str(self) -> &'static str {
        match self {
            Dtype::Float32 => "float32",
            Dtype::Bfloat16 => "bfloat16",
            Dtype::Float16 => "float16",
        }
    }

    /// The format of a name as config files spell it.
    pub fn parse(name: &str) -> Option<Self> {
        match name.strip_prefix("torch.").unwrap_or(name) {
            "float32" | "float" => Some(Dtype::Float32),
            "bfloat16" => Some(Dtype::Bfloat16),
            "float16" | "half" => Some(Dtype::Float16),
            _ => None,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What `--dtype` asks for.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, clap::ValueEnum)]
pub enum DtypeChoice {
    /// The checkpoint's own format.
    #[default]
    Auto,
    /// Single precision.
    Float32,
    /// bfloat16 weights.
    Bfloat16,
    /// Half precision weights; values beyond ±65504 are refused.
    Float16,
}

impl DtypeChoice {
    /// The format for a checkpoint whose own is `stored`.
    pub fn resolve(self, stored: Dtype) -> Dtype {
        match self {
            DtypeChoice::Auto => stored,
            DtypeChoice::Float32 => Dtype::Float32,
            DtypeChoice::Bfloat16 => Dtype::Bfloat16,
            DtypeChoice::Float16 => Dtype::Float16,
        }
    }
}
