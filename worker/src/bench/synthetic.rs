//! Checkpoints of random weights in the shape of published ones: what computes and loads like them, and says nothing.

use std::fs::{self, File};
use std::io::{BufWriter, Result, Write};
use std::path::Path;
use std::str::FromStr;

use serde_json::{Map, Value, json};

/// A model's shape.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Shape {
    /// Tokens of the vocabulary; the output head is the embedding.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Inner width of the dense networks.
    pub inner: usize,
    /// The longest sequence.
    pub context: usize,
    /// The experts of all layers but the first few.
    pub experts: Option<Experts>,
}

/// A mixture of experts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Experts {
    /// All of them.
    pub count: usize,
    /// Those that one token goes through.
    pub active: usize,
    /// Inner width of one.
    pub inner: usize,
    /// Experts that every token goes through, beside them.
    pub shared: usize,
    /// Layers at the beginning that are dense.
    pub dense_layers: usize,
}

impl Shape {
    /// ERNIE-4.5-0.3B: 361 million weights.
    pub const ERNIE_0_3B: Self = Self {
        vocab: 103_424,
        hidden: 1024,
        layers: 18,
        heads: 16,
        kv_heads: 2,
        head_dim: 128,
        inner: 3072,
        context: 131_072,
        experts: None,
    };
    /// ERNIE-4.5-21B-A3B: 21.8 billion weights, of which a token meets 3.3.
    pub const ERNIE_21B_A3B: Self = Self {
        vocab: 103_424,
        hidden: 2560,
        layers: 28,
        heads: 20,
        kv_heads: 4,
        head_dim: 128,
        inner: 12_288,
        context: 131_072,
        experts: Some(Experts { count: 64, active: 6, inner: 1536, shared: 2, dense_layers: 1 }),
    };

    fn config(&self) -> Value {
        let mut config = json!({
            "vocab_size": self.vocab, "hidden_size": self.hidden, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "intermediate_size": self.inner, "max_position_embeddings": self.context, "torch_dtype": "bfloat16",
            "model_type": "ernie4_5", "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2,
            "rope_theta": 500_000.0, "rms_norm_eps": 1e-5,
        });
        if let Some(experts) = self.experts {
            for (key, value) in [
                ("model_type", json!("ernie4_5_moe")),
                ("moe_num_experts", json!(experts.count)),
                ("moe_k", json!(experts.active)),
                ("moe_intermediate_size", json!(experts.inner)),
                ("moe_layer_start_index", json!(experts.dense_layers)),
                ("moe_num_shared_experts", json!(experts.shared)),
            ] {
                config[key] = value;
            }
        }
        config
    }

    /// Names, shapes and formats of all tensors, in the order of the file.
    fn tensors(&self) -> Vec<(String, Vec<usize>, &'static str)> {
        let Self { vocab, hidden, heads, kv_heads, head_dim, inner, .. } = *self;
        let mut all = vec![("embed_tokens.weight".to_owned(), vec![vocab, hidden], "BF16")];
        for layer in 0..self.layers {
            let mut add = |name: String, shape: &[usize], dtype| {
                all.push((format!("layers.{layer}.{name}"), shape.to_vec(), dtype));
            };
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                add(format!("{norm}.weight"), &[hidden], "BF16");
            }
            for (name, width) in [("q", heads), ("k", kv_heads), ("v", kv_heads)] {
                add(format!("self_attn.{name}_proj.weight"), &[width * head_dim, hidden], "BF16");
            }
            add("self_attn.o_proj.weight".to_owned(), &[hidden, heads * head_dim], "BF16");
            let experts = self.experts.filter(|experts| layer >= experts.dense_layers);
            let mut networks = match experts {
                None => vec![("mlp".to_owned(), inner)],
                Some(experts) => {
                    (0..experts.count).map(|expert| (format!("mlp.experts.{expert}"), experts.inner)).collect()
                }
            };
            if let Some(experts) = experts.filter(|experts| experts.shared > 0) {
                networks.push(("mlp.shared_experts".to_owned(), experts.shared * experts.inner));
            }
            for (network, inner) in networks {
                add(format!("{network}.gate_proj.weight"), &[inner, hidden], "BF16");
                add(format!("{network}.up_proj.weight"), &[inner, hidden], "BF16");
                add(format!("{network}.down_proj.weight"), &[hidden, inner], "BF16");
            }
            if let Some(experts) = experts {
                add("mlp.gate.weight".to_owned(), &[experts.count, hidden], "F32");
                add("mlp.moe_statics.e_score_correction_bias".to_owned(), &[1, experts.count], "F32");
            }
        }
        all.push(("norm.weight".to_owned(), vec![hidden], "BF16"));
        all
    }

    /// Writes a checkpoint of small random weights, without a tokenizer; returns the bytes of its weights' file.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<u64> {
        fs::create_dir_all(folder)?;
        fs::write(folder.join("config.json"), self.config().to_string())?;
        let (mut header, mut end) = (Map::new(), 0);
        for (name, shape, dtype) in self.tensors() {
            let start = end;
            end += shape.iter().product::<usize>() * if dtype == "F32" { 4 } else { 2 };
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
            header.insert(format!("model.{name}"), entry);
        }
        let header = Value::Object(header).to_string();
        let path = folder.join("model.safetensors");
        let mut file = BufWriter::new(File::create(&path)?);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        let pattern = pattern();
        let mut left = end;
        while left > 0 {
            let count = left.min(pattern.len());
            file.write_all(&pattern[..count])?;
            left -= count;
        }
        file.flush()?;
        Ok(fs::metadata(path)?.len())
    }
}

/// Weights that are repeated through the file, in an odd number so that rows differ. Both halves of a single made of two
/// such words are small, so that they will do for routers too.
fn pattern() -> Vec<u8> {
    let mut state = 1u64;
    let mut word = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let sign = (state >> 63) as u16;
        (sign << 15) | (0x3c00 + ((state >> 40) as u16 & 0xff))
    };
    (0..(1 << 19) + 1).flat_map(|_| word().to_le_bytes()).collect()
}

impl FromStr for Shape {
    type Err = String;

    /// `ernie-4.5-0.3b` or `ernie-4.5-21b-a3b`, with `:layers=N` for one that fits a small machine.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (name, layers) = match text.split_once(':') {
            Some((name, rest)) => (name, Some(rest)),
            None => (text, None),
        };
        let mut shape = match name {
            "ernie-4.5-0.3b" => Self::ERNIE_0_3B,
            "ernie-4.5-21b-a3b" => Self::ERNIE_21B_A3B,
            _ => return Err("must be ernie-4.5-0.3b or ernie-4.5-21b-a3b, with :layers=N behind it for fewer".into()),
        };
        if let Some(rest) = layers {
            let number = rest.strip_prefix("layers=").and_then(|number| number.parse().ok());
            shape.layers = number
                .filter(|layers| (1..=shape.layers).contains(layers))
                .ok_or_else(|| format!("the part behind : must be layers=N, with N from 1 to {}", shape.layers))?;
        }
        Ok(shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Checkpoint;

    #[test]
    fn the_published_shapes_have_the_published_numbers_of_weights() {
        let count = |shape: &Shape| -> usize {
            shape.tensors().iter().map(|(_, shape, _)| shape.iter().product::<usize>()).sum()
        };
        assert_eq!(count(&Shape::ERNIE_0_3B) / 1_000_000, 360);
        assert_eq!(count(&Shape::ERNIE_21B_A3B) / 10_000_000, 2182);
    }

    #[test]
    fn names_of_shapes_are_read_with_a_number_of_layers() {
        assert_eq!("ernie-4.5-0.3b".parse(), Ok(Shape::ERNIE_0_3B));
        assert_eq!("ernie-4.5-21b-a3b:layers=4".parse(), Ok(Shape { layers: 4, ..Shape::ERNIE_21B_A3B }));
        for (text, remedy) in [
            ("ernie", "ernie-4.5-0.3b"),
            ("ernie-4.5-0.3b:layers=0", "from 1 to 18"),
            ("ernie-4.5-0.3b:layers=19", "from 1 to 18"),
            ("ernie-4.5-0.3b:heads=1", "layers=N"),
        ] {
            assert!(text.parse::<Shape>().expect_err(text).contains(remedy), "{text}");
        }
    }

    #[test]
    fn what_is_written_is_a_sound_checkpoint() {
        let experts = Experts { count: 4, active: 2, inner: 16, shared: 1, dense_layers: 1 };
        for (layers, experts) in [(1, None), (3, Some(experts))] {
            let folder = tempfile::tempdir().expect("a folder");
            let shape = Shape {
                vocab: 64,
                hidden: 32,
                layers,
                heads: 4,
                kv_heads: 2,
                head_dim: 8,
                inner: 48,
                context: 128,
                experts,
            };
            shape.write(folder.path()).expect("written");
            let checkpoint = Checkpoint::inspect(folder.path()).expect("sound");
            assert_eq!(checkpoint.config.layers, layers);
        }
    }
}
