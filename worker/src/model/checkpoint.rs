//! A model folder, looked at without reading a weight: its configuration, and which tensor lies where.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::config::{GenerationDefaults, ModelConfig};
use super::dtype::Dtype;
use super::error::{LoadError, LoadResult};
use super::json::{self, Object};
use super::safetensors::{Header, Stored};

/// The one file of an unsharded checkpoint.
const SINGLE: &str = "model.safetensors";
/// The index of a sharded one.
const INDEX: &str = "model.safetensors.index.json";
/// The longest index, in bytes.
const INDEX_LIMIT: u64 = 32 << 20;
/// The most files of one checkpoint.
const SHARD_LIMIT: usize = 4096;

/// Where a tensor lies.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Place {
    /// Index into [`TensorFiles::files`].
    pub file: usize,
    /// How its numbers are stored.
    pub stored: Stored,
    /// Its dimensions, slowest first.
    pub shape: Vec<usize>,
    /// Where its bytes begin in the file.
    pub offset: u64,
    /// Its bytes.
    pub bytes: u64,
}

/// The tensors of a folder, none of them read.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TensorFiles {
    /// The folder.
    pub folder: PathBuf,
    /// Its weight files.
    pub files: Vec<PathBuf>,
    /// Every tensor of every file by name.
    pub places: BTreeMap<String, Place>,
}

impl TensorFiles {
    /// Bytes of all tensors in the files.
    pub fn bytes(&self) -> u64 {
        self.places.values().map(|place| place.bytes).sum()
    }
}

/// A checked model folder: everything but the weights.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// The folder.
    pub path: PathBuf,
    /// Architecture and sizes, with what only the tensors decide filled in.
    pub config: ModelConfig,
    /// The makers' sampling defaults.
    pub generation: GenerationDefaults,
    /// The number format of `--dtype auto`.
    pub dtype: Dtype,
    /// Every tensor of every weight file.
    pub tensors: TensorFiles,
    /// What a user should know although it stops nothing, in sentences.
    pub warnings: Vec<String>,
}

impl Checkpoint {
    /// Reads configuration and headers of a folder in the layout of the model hub, and checks that they describe one
    /// complete model. Takes milliseconds; no weight is read and nothing large is allocated.
    ///
    /// # Errors
    /// [`LoadError`] that names the file, the key or the tensor.
    pub fn inspect(path: &Path) -> Result<Self, LoadError> {
        check_folder(path)?;
        let config = ModelConfig::read(&path.join("config.json"))?;
        let generation_path = path.join("generation_config.json");
        let generation = if generation_path.exists() {
            GenerationDefaults::read(&generation_path, &config)?
        } else {
            GenerationDefaults::of_config(&config)
        };
        let headers = headers(path)?;
        let files = headers.iter().map(|header| header.path.clone()).collect();
        let mut checkpoint = Self {
            path: path.to_owned(),
            dtype: config.dtype.unwrap_or(Dtype::Float32),
            config,
            generation,
            tensors: TensorFiles { folder: path.to_owned(), files, places: catalogue(headers)? },
            warnings: Vec::new(),
        };
        checkpoint.resolve();
        super::inventory::check(&mut checkpoint)?;
        Ok(checkpoint)
    }

    /// Fills in what the config left to the tensors.
    fn resolve(&mut self) {
        if self.config.dtype.is_none()
            && let Some(dtype) =
                self.tensors.places.get("model.embed_tokens.weight").and_then(|place| place.stored.dtype())
        {
            self.dtype = dtype;
        }
        let has_shared = self.tensors.places.keys().any(|name| name.contains(".mlp.shared_experts."));
        if let super::config::Architecture::Moe(moe) = &mut self.config.architecture {
            // transformers takes 2 where the key is missing; without such tensors there can be none
            moe.shared = moe.shared.or(Some(if has_shared { 2 } else { 0 }));
        }
        for (file, keys) in
            [("config.json", &self.config.unknown_keys), ("generation_config.json", &self.generation.unknown_keys)]
        {
            if !keys.is_empty() {
                self.warnings.push(format!("{file}: unknown keys have no effect: {}", keys.join(", ")));
            }
        }
    }
}

/// Explains a folder that is no model folder.
fn check_folder(path: &Path) -> Result<(), LoadError> {
    if !path.is_dir() {
        let what = if path.exists() { "is not a folder" } else { "does not exist" };
        return Err(LoadError::not_found(format!("the model folder {} {what}: mount the model there", path.display())));
    }
    if !path.join("config.json").exists() {
        return Err(LoadError::not_found(format!(
            "{} has no config.json: it must hold a model in the layout of the model hub (config.json, *.safetensors, \
             tokenizer)",
            path.display()
        )));
    }
    Ok(())
}

/// The headers of a folder's weight files.
fn headers(path: &Path) -> Result<Vec<Header>, LoadError> {
    let single = path.join(SINGLE);
    if single.exists() {
        return Ok(vec![Header::read(&single)?]);
    }
    let index = path.join(INDEX);
    if index.exists() {
        return shards(path, &index);
    }
    let stems = ["pytorch_model.bin", "pytorch_model.bin.index.json", "model_state.pdparams"];
    let other = stems.into_iter().find(|name| path.join(name).exists());
    let seen = other.map(|name| format!(", only {name}: convert it to safetensors")).unwrap_or_default();
    Err(LoadError::not_found(format!("{} has neither {SINGLE} nor {INDEX}{seen}", path.display())))
}

/// What matters in the index of a sharded checkpoint.
#[derive(Deserialize)]
struct Index {
    weight_map: Object<String>,
}

/// The tensors of each file of a sharded checkpoint, by the names of the files, from the text of its index; `file` is
/// what errors call it.
///
/// # Errors
/// [`LoadError`] when the text is no index, or names what is no safetensors file of the same folder.
pub fn shard_names(file: &str, text: &str) -> LoadResult<BTreeMap<String, BTreeSet<String>>> {
    let Index { weight_map } = serde_json::from_str(text)
        .map_err(|error| LoadError::corrupt(format!("{file} is not a map from tensor to file name: {error}")))?;
    let mut by_file = BTreeMap::<String, BTreeSet<String>>::new();
    for (tensor, shard) in weight_map.0 {
        let plain = Path::new(&shard).file_name().is_some_and(|name| name == shard.as_str());
        // The digest of a folder leaves hidden files out.
        if !plain || shard.starts_with('.') || !shard.ends_with(".safetensors") {
            return Err(LoadError::corrupt(format!("{file}: {tensor} lies in {shard:?}, which is no file name here")));
        }
        by_file.entry(shard).or_default().insert(tensor);
    }
    if by_file.is_empty() || by_file.len() > SHARD_LIMIT {
        return Err(LoadError::corrupt(format!("{file} names {} files, must be 1..={SHARD_LIMIT}", by_file.len())));
    }
    Ok(by_file)
}

/// The headers of a sharded checkpoint; index and shards must agree on every tensor.
fn shards(path: &Path, index: &Path) -> Result<Vec<Header>, LoadError> {
    let by_file = shard_names(&index.display().to_string(), &json::read_text(index, INDEX_LIMIT)?)?;
    by_file
        .into_iter()
        .map(|(file, mut wanted)| {
            let shard = path.join(&file);
            if !shard.exists() {
                return Err(LoadError::not_found(format!("{} is missing; {INDEX} names it", shard.display())));
            }
            let header = Header::read(&shard)?;
            for tensor in &header.tensors {
                if !wanted.remove(&tensor.name) {
                    return Err(LoadError::corrupt(format!(
                        "{} has the tensor {:?}, which {INDEX} does not place there",
                        shard.display(),
                        tensor.name
                    )));
                }
            }
            match wanted.first() {
                None => Ok(header),
                Some(name) => Err(LoadError::corrupt(format!(
                    "{} lacks the tensor {name:?}, which {INDEX} places there",
                    shard.display()
                ))),
            }
        })
        .collect()
}

/// All tensors of all files by name.
pub(super) fn catalogue(headers: Vec<Header>) -> Result<BTreeMap<String, Place>, LoadError> {
    let mut tensors = BTreeMap::new();
    for (file, header) in headers.into_iter().enumerate() {
        for tensor in header.tensors {
            let place =
                Place { file, stored: tensor.stored, shape: tensor.shape, offset: tensor.offset, bytes: tensor.bytes };
            if tensors.contains_key(&tensor.name) {
                return Err(LoadError::corrupt(format!("two files have the tensor {:?}", tensor.name)));
            }
            tensors.insert(tensor.name, place);
        }
    }
    Ok(tensors)
}
