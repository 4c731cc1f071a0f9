//! Quantisation of weights while they are loaded.

use std::fmt;

use ernie_kernels::WeightFormat;
use serde::{Deserialize, Serialize};

use super::pack::Precision;

/// What `--quantization` asks for.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// Weights are kept as `--dtype` says.
    #[default]
    None,
    /// Linear maps and the head in 8 bits.
    Int8,
    /// Linear maps in 4 bits, the head in 8.
    Int4,
}

impl Quantization {
    /// The format of a weight's matrix, where it is quantised. Routers, biases, norms, and an embedding that is not also the
    /// head are not.
    pub fn format(self, precision: Precision) -> Option<WeightFormat> {
        match (self, precision) {
            (Quantization::None, _) | (_, Precision::Single | Precision::Working) => None,
            (Quantization::Int8, _) | (Quantization::Int4, Precision::Head) => Some(WeightFormat::Int8),
            (Quantization::Int4, Precision::Linear) => Some(WeightFormat::Int4),
        }
    }

    /// The name in flags and fields.
    pub fn as_str(self) -> &'static str {
        match self {
            Quantization::None => "none",
            Quantization::Int8 => "int8",
            Quantization::Int4 => "int4",
        }
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
