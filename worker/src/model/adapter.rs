//! Low-rank adapters in PEFT's layout: W' = W + s·B·A for any subset of a layer's linear maps.
//!
//! What a folder says is checked here; `attach` finds the place of every tensor in the model.

mod attach;

use std::path::{Path, PathBuf};

use ernie_proto::failure::Reason;
use regex::Regex;
use serde_json::{Map, Value};

use super::checkpoint::{TensorFiles, catalogue};
use super::error::{LoadError, LoadResult};
use super::json::Fields;
use super::safetensors::Header;
use super::weights::Weights;

/// The largest rank.
const MAX_RANK: u64 = 4096;
/// The longest pattern on a module's name, the most of them, and the most that are more than a name.
const PATTERN_LIMIT: usize = 512;
const PATTERNS_LIMIT: usize = 4096;
const REGEX_LIMIT: usize = 128;

/// Keys that concern training only, or say nothing that this code depends on: the tensors tell what is adapted.
const IGNORED: [&str; 22] = [
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "monteclora_config",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
];

/// An adapter's scale: alpha / r, or alpha / √r.
#[derive(Debug)]
pub struct Scale {
    rank: usize,
    alpha: f64,
    root: bool,
    ranks: Vec<(Pattern, f64)>,
    alphas: Vec<(Pattern, f64)>,
}

/// A regular expression on the name of a module, which must match to its end, after nothing or after a dot.
#[derive(Debug)]
enum Pattern {
    /// A name, in which a dot is any character. Compiled, each would take as much memory as thousands of names do.
    Name(String),
    Regex(Box<Regex>),
}

impl Pattern {
    fn new(text: &str) -> Option<Self> {
        if text.len() > PATTERN_LIMIT {
            return None;
        }
        if text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.".contains(&byte)) {
            return Some(Self::Name(text.to_owned()));
        }
        let mut builder = regex::RegexBuilder::new(&format!(r"^(.*\.)?({text})$"));
        builder.size_limit(1 << 16).dfa_size_limit(1 << 16).build().ok().map(|regex| Self::Regex(Box::new(regex)))
    }

    fn matches(&self, module: &str) -> bool {
        match self {
            Self::Name(name) => module.len().checked_sub(name.len()).is_some_and(|start| {
                let (before, end) = module.as_bytes().split_at(start);
                let alike = end.iter().zip(name.as_bytes()).all(|(found, wanted)| found == wanted || *wanted == b'.');
                alike && before.last().is_none_or(|&last| last == b'.')
            }),
            Self::Regex(regex) => regex.is_match(module),
        }
    }
}

impl Scale {
    /// Reads the text of an `adapter_config.json`; `file` is what errors call it.
    ///
    /// # Errors
    /// [`LoadError`] that names the key; [`Reason::UnsupportedModel`] for kinds of adapters that are not computed.
    pub fn parse(file: &str, text: &str) -> LoadResult<Self> {
        scale(Fields::parse(file, text)?)
    }

    /// The rank that the config gives a module.
    pub fn rank(&self, module: &str) -> usize {
        pattern(&self.ranks, module).map_or(self.rank, |rank| rank as usize)
    }

    /// The scale of a module.
    pub fn of(&self, module: &str) -> f32 {
        let (rank, alpha) = (self.rank(module) as f64, pattern(&self.alphas, module).unwrap_or(self.alpha));
        (alpha / if self.root { rank.sqrt() } else { rank }) as f32
    }
}

/// The value of the first pattern that matches a module's name.
fn pattern(patterns: &[(Pattern, f64)], module: &str) -> Option<f64> {
    patterns.iter().find(|(pattern, _)| pattern.matches(module)).map(|&(_, value)| value)
}

/// A checked adapter folder: everything but the weights.
#[derive(Debug)]
pub struct Adapter {
    /// The name that requests call it by.
    pub name: String,
    /// Its tensors.
    pub tensors: TensorFiles,
    scale: Scale,
}

impl Adapter {
    /// Reads the configuration and the header of an adapter folder.
    ///
    /// # Errors
    /// [`LoadError`] that names the file and the key.
    pub fn inspect(name: &str, path: &Path) -> LoadResult<Self> {
        let config = path.join("adapter_config.json");
        if !config.exists() {
            return Err(LoadError::not_found(format!(
                "adapter {name:?}: {} does not exist: --adapter takes NAME=DIR with a folder that PEFT saved",
                config.display()
            )));
        }
        let scale = scale(Fields::read(&config)?)?;
        let weights = path.join("adapter_model.safetensors");
        if !weights.exists() {
            let only_bin = path.join("adapter_model.bin").exists();
            let seen = if only_bin { ", only adapter_model.bin: save it as safetensors" } else { "" };
            return Err(LoadError::not_found(format!("adapter {name:?}: {} does not exist{seen}", weights.display())));
        }
        let header = Header::read(&weights)?;
        let tensors = TensorFiles { folder: path.to_owned(), files: vec![weights], places: catalogue(vec![header])? };
        Ok(Self { name: name.to_owned(), tensors, scale })
    }

    /// Reads what the folders of several adapters say, each a name and a path.
    ///
    /// # Errors
    /// As [`Adapter::inspect`]; [`Reason::Usage`] when two have one name.
    pub fn inspect_all(folders: &[(String, PathBuf)]) -> LoadResult<Vec<Self>> {
        let mut adapters = Vec::<Self>::new();
        for (name, path) in folders {
            if adapters.iter().any(|known| known.name == *name) {
                return Err(LoadError::new(Reason::Usage, format!("--adapter names {name:?} twice")));
            }
            adapters.push(Self::inspect(name, path)?);
        }
        Ok(adapters)
    }

    /// Bytes of its weights in memory, where they are single precision.
    pub fn bytes(&self) -> u64 {
        self.tensors.places.values().map(|place| 4 * place.shape.iter().product::<usize>() as u64).sum()
    }

    /// Tells adapters apart by name, scale and what was read of their `weights`.
    fn digest(&self, weights: &Weights<'_>) -> [u8; 32] {
        let identity = format!("{:?} {:?} {}", self.name, self.scale, weights.fingerprint());
        *blake3::hash(identity.as_bytes()).as_bytes()
    }
}

/// An adapter that is part of a loaded model.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LoadedAdapter {
    /// The name that requests call it by.
    pub name: String,
    /// Tells it apart from other adapters, for caches and for the identity of answers.
    pub digest: [u8; 32],
}

/// Reads what of `adapter_config.json` matters and refuses the kinds of adapters that are not computed.
fn scale(mut fields: Fields) -> LoadResult<Scale> {
    match fields.take_set("peft_type") {
        Some(value) if value.as_str() == Some("LORA") => {}
        value => return Err(fields.unsupported("peft_type", &value.unwrap_or_default(), "\"LORA\"")),
    }
    for (key, wanted) in [("bias", "none"), ("lora_bias", "false")] {
        if let Some(value) = fields.take_set(key)
            && value.as_str() != Some(wanted)
            && value.as_bool() != Some(false)
        {
            return Err(fields.unsupported(key, &value, wanted));
        }
    }
    // these change the base weights, which are then no longer those of the model served here
    let harmless = ["gaussian", "eva", "orthogonal", "mica"];
    if let Some(value) = fields.take_set("init_lora_weights")
        && !value.is_boolean()
        && !value.as_str().is_some_and(|kind| harmless.contains(&kind))
    {
        let wanted = "an initialisation that leaves the base model as it is: convert the adapter with PEFT's \
                      path_initial_model_for_weight_conversion";
        return Err(fields.unsupported("init_lora_weights", &value, wanted));
    }
    let scale = Scale {
        rank: fields.required("r", 1..=MAX_RANK)?,
        alpha: fields.number("lora_alpha", 0.0..=1e6)?.unwrap_or(8.0),
        root: fields.flag("use_rslora")?.unwrap_or(false),
        ranks: patterns(&mut fields, "rank_pattern", 1.0..=MAX_RANK as f64)?,
        alphas: patterns(&mut fields, "alpha_pattern", 0.0..=1e6)?,
    };
    for key in IGNORED {
        fields.take(key);
    }
    // a key that says no changes nothing, whatever it is; one that says yes is a kind of adapter of its own
    for (key, value) in fields.rest() {
        let off = value.is_null()
            || value == Value::Bool(false)
            || value == Value::Object(Map::new())
            || value == Value::Array(Vec::new());
        if !off {
            return Err(fields.unsupported(&key, &value, "absent or false"));
        }
    }
    Ok(scale)
}

/// Patterns on module names with a number each; PEFT matches them to the end of a name, after any prefix.
fn patterns(fields: &mut Fields, key: &str, range: std::ops::RangeInclusive<f64>) -> LoadResult<Vec<(Pattern, f64)>> {
    let Some(value) = fields.take_set(key) else { return Ok(Vec::new()) };
    let Some(map) = value.as_object().filter(|map| map.len() <= PATTERNS_LIMIT) else {
        let wanted = format!("an object from at most {PATTERNS_LIMIT} names to numbers");
        return Err(fields.out_of_range(key, &value, &wanted));
    };
    let mut compiled = 0;
    map.iter()
        .map(|(name, number)| {
            let pattern = Pattern::new(name);
            compiled += usize::from(matches!(pattern, Some(Pattern::Regex(_))));
            if compiled > REGEX_LIMIT {
                let wanted = format!("at most {REGEX_LIMIT} regular expressions beside plain names");
                return Err(fields.out_of_range(key, &value, &wanted));
            }
            match (pattern, number.as_f64().filter(|number| range.contains(number))) {
                (Some(pattern), Some(number)) => Ok((pattern, number)),
                (None, _) => Err(fields.out_of_range(key, &Value::from(name.as_str()), "a regular expression")),
                (_, None) => {
                    let wanted = format!("a number in {:?}..={:?} for {name:?}", range.start(), range.end());
                    Err(fields.out_of_range(key, number, &wanted))
                }
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(config: &Value) -> LoadResult<Scale> {
        scale(Fields::parse("adapter_config.json", &config.to_string())?)
    }

    #[test]
    fn the_scale_follows_rank_alpha_and_patterns() {
        let config = json!({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_dora": false, "modules_to_save": null,
            "rank_pattern": {"v_proj": 4, r"layers\.1\..*\.q_proj": 2}, "alpha_pattern": {"^model.layers.0.self_attn.k_proj": 1}});
        let scale = read(&config).expect("read");
        assert_eq!(scale.of("model.layers.0.self_attn.o_proj"), 2.0);
        assert_eq!(scale.of("model.layers.0.self_attn.v_proj"), 4.0);
        assert_eq!(scale.of("model.layers.1.self_attn.q_proj"), 8.0);
        assert_eq!(scale.of("model.layers.11.self_attn.q_proj"), 2.0);
        assert_eq!(scale.of("model.layers.0.self_attn.k_proj"), 0.125);
        let root = read(&json!({"peft_type": "LORA", "r": 16, "lora_alpha": 8, "use_rslora": true})).expect("read");
        assert_eq!(root.of("model.layers.0.mlp.up_proj"), 2.0);
    }

    #[test]
    fn plain_names_match_as_their_regular_expression_does() {
        let modules = ["q_proj", "model.layers.0.self_attn.q_proj", "model.layers.10.mlp.q_projx", "aq_proj", "", "x."];
        for name in ["q_proj", "self_attn.q_proj", "layers.0.self_attn.q_proj", "0.self_attn", "", ".", "..", "Xq_proj"]
        {
            let pattern = Pattern::new(name).expect("a pattern");
            assert!(matches!(pattern, Pattern::Name(_)));
            let regex = Regex::new(&format!(r"^(.*\.)?({name})$")).expect("a regular expression");
            for module in modules {
                assert_eq!(pattern.matches(module), regex.is_match(module), "{name:?} on {module:?}");
            }
        }
    }

    #[test]
    fn patterns_are_as_many_as_modules_and_regular_expressions_few() {
        let with = |patterns: serde_json::Map<String, Value>| {
            read(&json!({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "rank_pattern": patterns})).map(|_| ())
        };
        let named = |name: &dyn Fn(usize) -> String, count| (0..count).map(|number| (name(number), json!(4))).collect();
        with(named(&|number| format!("layers.{number}.q_proj"), 4096)).expect("names");
        let error = with(named(&|number| format!("layers.{number}.q_proj"), 4097)).expect_err("too many").to_string();
        assert!(error.contains("rank_pattern") && error.contains("4096"), "{error}");
        let error = with(named(&|number| format!(r"layers\.{number}\.q_proj"), 129)).expect_err("too many").to_string();
        assert!(error.contains("rank_pattern") && error.contains("128 regular expressions"), "{error}");
        let error = with(named(&|_| r"\w{500}".to_owned(), 1)).expect_err("too large").to_string();
        assert!(error.contains("rank_pattern") && error.contains("regular expression"), "{error}");
    }

    #[test]
    fn other_kinds_of_adapters_are_refused_by_name() {
        for (key, value) in [
            ("peft_type", json!("LOHA")),
            ("use_dora", json!(true)),
            ("bias", json!("all")),
            ("lora_bias", json!(true)),
            ("fan_in_fan_out", json!(true)),
            ("modules_to_save", json!(["lm_head"])),
            ("layer_replication", json!([[0, 2]])),
            ("trainable_token_indices", json!([1])),
            ("alora_invocation_tokens", json!([1])),
            ("use_qalora", json!(true)),
            ("init_lora_weights", json!("pissa")),
            ("r", json!(0)),
            ("r", json!(1_000_000)),
            ("lora_alpha", json!("big")),
            ("rank_pattern", json!({"(": 4})),
            ("rank_pattern", json!({"q_proj": 0})),
            ("alpha_pattern", json!([1])),
        ] {
            let mut config = json!({"peft_type": "LORA", "r": 8, "lora_alpha": 16});
            config[key] = value;
            let error = read(&config).expect_err(key).to_string();
            assert!(error.contains(key), "{error}");
        }
    }
}
