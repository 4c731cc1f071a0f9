//! `config.json` as a typed value that cannot be wrong: published and current spellings, every number in its range,
//! unknown keys reported, and what this worker does not compute refused by the key's name.

mod generation;

use std::path::Path;

use serde_json::Value;

use super::attention::SlidingWindow;
use super::dtype::Dtype;
use super::error::LoadError;
use super::json::Fields;

pub use generation::GenerationDefaults;

/// The largest vocabulary, in tokens.
const MAX_VOCAB: u64 = 1 << 22;
/// The largest hidden or inner width.
const MAX_WIDTH: u64 = 1 << 20;
/// The largest number of layers, heads or experts.
const MAX_PARTS: u64 = 4096;
/// The longest context: positions up to here are exact as f32.
const MAX_POSITIONS: u64 = 1 << 24;

/// Keys that say nothing about the arithmetic of inference.
const IGNORED: [&str; 38] = [
    "_attn_implementation",
    "_commit_hash",
    "_name_or_path",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "auto_map",
    "chunk_size_feed_forward",
    "fuse_rms_norm",
    "fuse_rope",
    "fuse_softmax_mask",
    "fuse_swiglu",
    "hidden_dropout_prob",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "moe_all_to_all_dropout",
    "moe_aux_loss_lambda",
    "moe_capacity",
    "moe_dropout_prob",
    "moe_gate",
    "moe_group_experts",
    "moe_layer_feed_fake_token",
    "moe_orthogonal_loss_lambda",
    "moe_reverse_token_drop",
    "moe_use_aux_free",
    "moe_use_hard_gate",
    "moe_z_loss_lambda",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pretraining_tp",
    "return_dict",
    "router_aux_loss_coef",
    "task_specific_params",
    "token_balance_loss",
    "transformers_version",
    "use_cache",
];

/// The model class.
#[derive(Clone, Debug, PartialEq)]
pub enum Architecture {
    /// `ernie4_5`: every layer has one feed-forward network.
    Dense,
    /// `ernie4_5_moe`: some layers have routed experts.
    Moe(MoeConfig),
}

/// The mixture of experts of `ernie4_5_moe`.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeConfig {
    /// Routed experts in a layer.
    pub experts: usize,
    /// Experts that compute a token.
    pub active: usize,
    /// Inner width of a routed expert.
    pub intermediate_size: usize,
    /// Shared experts, each as wide as a routed one; `None` when the config does not say, and the tensors decide.
    pub shared: Option<usize>,
    /// The first layer that may have experts.
    pub first_layer: usize,
    /// The last layer that may have experts.
    pub last_layer: usize,
    /// Layer i has experts only if i + 1 is a multiple of this.
    pub interval: usize,
    /// The smallest divisor when the chosen experts' weights are normalised.
    pub norm_min: f32,
}

/// A checkpoint's architecture and sizes.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The model class, with what only it has.
    pub architecture: Architecture,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Inner width of a dense feed-forward network.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head, even; `heads × head_dim` may differ from `hidden_size`.
    pub head_dim: usize,
    /// The longest context, in tokens.
    pub max_positions: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Layers in which a token does not see all tokens before it.
    pub sliding_window: Option<SlidingWindow>,
    /// Whether q, k, v, o and dense feed-forward projections have biases.
    pub use_bias: bool,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// The number format that the config names.
    pub dtype: Option<Dtype>,
    /// Beginning of sequence.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<u32>,
    /// Padding.
    pub pad_token_id: Option<u32>,
    /// Blocks for multi-token prediction that the checkpoint announces; their tensors are not used.
    pub mtp_layers: usize,
    /// Keys that this version does not know, for the log.
    pub unknown_keys: Vec<String>,
}

impl ModelConfig {
    /// Reads `config.json` of a model folder.
    ///
    /// # Errors
    /// [`LoadError`] that names the key, its value and what it must be.
    pub fn read(path: &Path) -> Result<Self, LoadError> {
        Self::from_fields(Fields::read(path)?)
    }

    /// Reads the text of a `config.json`; `file` is what errors call it.
    ///
    /// # Errors
    /// As [`ModelConfig::read`].
    pub fn parse(file: &str, text: &str) -> Result<Self, LoadError> {
        Self::from_fields(Fields::parse(file, text)?)
    }

    fn from_fields(mut fields: Fields) -> Result<Self, LoadError> {
        let moe = is_moe(&mut fields)?;
        refuse_unsupported(&mut fields)?;
        refuse_quantised(&mut fields)?;
        let vocab_size = fields.required("vocab_size", 1..=MAX_VOCAB)?;
        let hidden_size = fields.required("hidden_size", 1..=MAX_WIDTH)?;
        let layers = fields.required("num_hidden_layers", 1..=MAX_PARTS)?;
        let heads = fields.required("num_attention_heads", 1..=MAX_PARTS)?;
        let config = ModelConfig {
            intermediate_size: fields.required("intermediate_size", 1..=MAX_WIDTH)?,
            kv_heads: kv_heads(&mut fields, heads, moe)?,
            head_dim: head_dim(&mut fields, hidden_size, heads, moe)?,
            max_positions: fields.count("max_position_embeddings", 1..=MAX_POSITIONS)?.unwrap_or(131_072),
            rms_norm_eps: fields.number("rms_norm_eps", 1e-12..=0.1)?.unwrap_or(1e-5) as f32,
            rope_theta: rope_theta(&mut fields)?,
            sliding_window: SlidingWindow::read(&mut fields, layers)?,
            use_bias: fields.flag("use_bias")?.unwrap_or(false),
            tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(true),
            dtype: dtype(&mut fields)?,
            bos_token_id: fields.token_ids("bos_token_id", vocab_size)?.first().copied(),
            eos_token_ids: fields.token_ids("eos_token_id", vocab_size)?,
            pad_token_id: pad_token_id(&mut fields, vocab_size)?,
            mtp_layers: fields.count("num_nextn_predict_layers", 0..=MAX_PARTS)?.unwrap_or(0),
            architecture: if moe { Architecture::Moe(moe_config(&mut fields, layers)?) } else { Architecture::Dense },
            vocab_size,
            hidden_size,
            layers,
            heads,
            unknown_keys: Vec::new(),
        };
        for key in IGNORED {
            fields.take(key);
        }
        Ok(ModelConfig { unknown_keys: fields.left(), ..config })
    }

    /// The name of the model class in `config.json`.
    pub fn model_type(&self) -> &'static str {
        match self.architecture {
            Architecture::Dense => "ernie4_5",
            Architecture::Moe(_) => "ernie4_5_moe",
        }
    }

    /// The mixture of experts of a layer, or `None` where it is dense.
    pub fn moe_layer(&self, layer: usize) -> Option<&MoeConfig> {
        match &self.architecture {
            Architecture::Moe(moe)
                if (moe.first_layer..=moe.last_layer).contains(&layer) && (layer + 1).is_multiple_of(moe.interval) =>
            {
                Some(moe)
            }
            _ => None,
        }
    }

    /// Width of all query heads together.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key heads together, which is that of all value heads.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// Decides the model class from `model_type` first, then `architectures`; they must not contradict each other.
fn is_moe(fields: &mut Fields) -> Result<bool, LoadError> {
    let by_type = match fields.take_set("model_type") {
        None => None,
        Some(Value::String(name)) if name == "ernie4_5" => Some(false),
        Some(Value::String(name)) if name == "ernie4_5_moe" => Some(true),
        Some(other) => {
            let known = "\"ernie4_5\" or \"ernie4_5_moe\" (text models of ERNIE 4.5)";
            return Err(fields.unsupported("model_type", &other, known));
        }
    };
    let by_class = match fields.take_set("architectures") {
        None => None,
        Some(value) => {
            let name = value.as_array().and_then(|list| if list.len() == 1 { list[0].as_str() } else { None });
            match name {
                Some("Ernie4_5ForCausalLM" | "Ernie4_5_ForCausalLM") => Some(false),
                Some("Ernie4_5_MoeForCausalLM") => Some(true),
                _ => {
                    let known =
                        "[\"Ernie4_5ForCausalLM\"], [\"Ernie4_5_ForCausalLM\"] or [\"Ernie4_5_MoeForCausalLM\"]";
                    return Err(fields.unsupported("architectures", &value, known));
                }
            }
        }
    };
    match (by_type, by_class) {
        (Some(by_type), Some(by_class)) if by_type != by_class => Err(fields.out_of_range(
            "architectures",
            &Value::from(if by_class { "Ernie4_5_MoeForCausalLM" } else { "Ernie4_5ForCausalLM" }),
            "the class of model_type",
        )),
        (Some(moe), _) | (None, Some(moe)) => Ok(moe),
        (None, None) => Err(fields.out_of_range("model_type", &Value::Null, "\"ernie4_5\" or \"ernie4_5_moe\"")),
    }
}

/// A key, whether a value of it is computed, and what the value must be.
type Rule<'a> = (&'a str, &'a dyn Fn(&Value) -> bool, &'a str);

/// Refuses what would change the arithmetic in a way that is not computed here.
fn refuse_unsupported(fields: &mut Fields) -> Result<(), LoadError> {
    let only = |allowed: &'static [&'static str]| {
        move |value: &Value| value.as_str().is_some_and(|name| allowed.contains(&name))
    };
    let is = |wanted: f64| move |value: &Value| value.as_f64() == Some(wanted);
    let off = |value: &Value| value.as_bool() == Some(false);
    let never = |_: &Value| false;
    let rules: [Rule<'_>; 8] = [
        ("hidden_act", &only(&["silu", "swish"]), "\"silu\""),
        ("attention_bias", &off, "false (use_bias is ERNIE's key)"),
        ("compression_ratio", &is(1.0), "1.0"),
        ("moe_gate_act", &only(&["softmax"]), "\"softmax\""),
        ("moe_multimodal_dispatch_use_allgather", &never, "absent (a key of vision-language models)"),
        ("partial_rotary_factor", &is(1.0), "1.0"),
        ("use_qk_norm", &off, "false"),
        ("vision_config", &never, "absent (vision-language models are not served)"),
    ];
    for (key, accepts, wanted) in rules {
        if let Some(value) = fields.take_set(key)
            && !accepts(&value)
        {
            return Err(fields.unsupported(key, &value, wanted));
        }
    }
    Ok(())
}

/// Refuses a checkpoint that is already quantised, by the name of its format.
fn refuse_quantised(fields: &mut Fields) -> Result<(), LoadError> {
    const KEY: &str = "quantization_config";
    let Some(value) = fields.take_set(KEY) else { return Ok(()) };
    let wanted = "absent: quantise the original checkpoint while it is loaded, with --quantization int8 or int4";
    let method = value.get("quant_method").and_then(Value::as_str).map(|method| {
        // The names of formats are short.
        let name: String = method.chars().take(40).collect();
        Value::from(format!("{name} (quant_method)"))
    });
    Err(fields.unsupported(KEY, &method.unwrap_or(value), wanted))
}

/// Key and value heads: absent means the class default of transformers, `null` means one for each query head.
fn kv_heads(fields: &mut Fields, heads: usize, moe: bool) -> Result<usize, LoadError> {
    const KEY: &str = "num_key_value_heads";
    let found = match fields.take(KEY) {
        None => Value::from(if moe { 4 } else { 2 }),
        Some(Value::Null) => Value::from(heads),
        Some(value) => value,
    };
    match found.as_u64() {
        Some(number) if number >= 1 && number <= heads as u64 && (heads as u64).is_multiple_of(number) => {
            Ok(number as usize)
        }
        _ => Err(fields.out_of_range(KEY, &found, &format!("a divisor of num_attention_heads = {heads}"))),
    }
}

/// Width of a head: absent means 128 in dense models and hidden / heads in MoE models; `null` means hidden / heads.
fn head_dim(fields: &mut Fields, hidden: usize, heads: usize, moe: bool) -> Result<usize, LoadError> {
    const KEY: &str = "head_dim";
    let found = match fields.take(KEY) {
        None if !moe => Value::from(128),
        None | Some(Value::Null) if hidden.is_multiple_of(heads) => Value::from(hidden / heads),
        None | Some(Value::Null) => {
            let wanted = format!("set, because num_attention_heads = {heads} does not divide hidden_size = {hidden}");
            return Err(fields.out_of_range(KEY, &Value::Null, &wanted));
        }
        Some(value) => value,
    };
    match found.as_u64() {
        Some(number) if (2..=1024).contains(&number) && number.is_multiple_of(2) => Ok(number as usize),
        _ => Err(fields.out_of_range(KEY, &found, "an even number in 2..=1024")),
    }
}

/// `rope_theta` at the top (published spelling) or in `rope_parameters` (transformers 5); no scaling.
fn rope_theta(fields: &mut Fields) -> Result<f32, LoadError> {
    const RANGE: std::ops::RangeInclusive<f64> = 1.0..=1e12;
    let mut theta = fields.number("rope_theta", RANGE)?;
    for key in ["rope_parameters", "rope_scaling"] {
        let Some(mut scaling) = fields.object(key)? else { continue };
        for kind in ["rope_type", "type"] {
            if let Some(value) = scaling.take_set(kind)
                && value.as_str() != Some("default")
            {
                return Err(scaling.unsupported(kind, &value, "\"default\" (no rotary scaling)"));
            }
        }
        let inner = scaling.number("rope_theta", RANGE)?;
        if let (Some(outer), Some(inner)) = (theta, inner)
            && outer != inner
        {
            return Err(scaling.out_of_range("rope_theta", &Value::from(inner), &format!("{outer}, as at the top")));
        }
        theta = theta.or(inner);
        if let Some(value) = scaling.take_set("partial_rotary_factor")
            && value.as_f64() != Some(1.0)
        {
            return Err(scaling.unsupported("partial_rotary_factor", &value, "1.0"));
        }
        if let Some(name) = scaling.left().first() {
            return Err(LoadError::unsupported(format!(
                "config.json: {key} has the key {name:?}, which only rotary scaling uses; it is not computed here"
            )));
        }
    }
    Ok(theta.unwrap_or(500_000.0) as f32)
}

/// `torch_dtype` (published spelling) or `dtype`.
fn dtype(fields: &mut Fields) -> Result<Option<Dtype>, LoadError> {
    let mut found = None;
    for key in ["torch_dtype", "dtype"] {
        let Some(value) = fields.take_set(key) else { continue };
        let Some(dtype) = value.as_str().and_then(Dtype::parse) else {
            return Err(fields.unsupported(key, &value, "\"float32\", \"bfloat16\" or \"float16\""));
        };
        if found.is_some_and(|other| other != dtype) {
            return Err(fields.out_of_range(key, &value, "what torch_dtype says"));
        }
        found = Some(dtype);
    }
    Ok(found)
}

/// The padding id; checkpoints without one say `null` or -1.
fn pad_token_id(fields: &mut Fields, vocab: usize) -> Result<Option<u32>, LoadError> {
    match fields.take_set("pad_token_id") {
        Some(value) if value.as_i64() == Some(-1) => Ok(None),
        Some(value) => match value.as_u64() {
            Some(id) if id < vocab as u64 => Ok(Some(id as u32)),
            _ => Err(fields.out_of_range("pad_token_id", &value, &format!("a token id below vocab_size = {vocab}"))),
        },
        None => Ok(None),
    }
}

fn moe_config(fields: &mut Fields, layers: usize) -> Result<MoeConfig, LoadError> {
    for key in ["moe_num_experts", "moe_intermediate_size", "moe_layer_start_index", "moe_layer_end_index"] {
        if let Some(value) = fields.peek(key).filter(|value| value.is_array()) {
            return Err(fields.unsupported(key, &value.clone(), "one number (lists belong to vision-language models)"));
        }
    }
    let experts = fields.required("moe_num_experts", 1..=MAX_PARTS)?;
    let last = layers as u64 - 1;
    let last_layer = match fields.take_set("moe_layer_end_index") {
        None => last,
        Some(value) if value.as_i64() == Some(-1) => last,
        Some(value) => match value.as_u64() {
            Some(number) if number <= last => number,
            _ => return Err(fields.out_of_range("moe_layer_end_index", &value, &format!("-1 or 0..={last}"))),
        },
    };
    Ok(MoeConfig {
        experts,
        active: fields.required("moe_k", 1..=experts as u64)?,
        intermediate_size: fields.required("moe_intermediate_size", 1..=MAX_WIDTH)?,
        shared: fields.count("moe_num_shared_experts", 0..=MAX_PARTS)?,
        first_layer: fields.count("moe_layer_start_index", 0..=last_layer)?.unwrap_or(1.min(last_layer as usize)),
        last_layer: last_layer as usize,
        interval: fields.count("moe_layer_interval", 1..=MAX_PARTS)?.unwrap_or(1),
        norm_min: fields.number("moe_norm_min", 0.0..=1.0)?.unwrap_or(1e-12) as f32,
    })
}

#[cfg(test)]
mod tests;
