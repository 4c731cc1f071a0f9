//! Images with a model folder in them, sound or broken.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::install::repository;
use crate::{Cluster, images};

/// Tells apart the images that one process makes.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// An image that a model can be served from.
pub struct ModelImage {
    /// Value for `spec.model.uri`.
    pub uri: String,
}

impl ModelImage {
    /// Packs a copy of the demo model after `change` has been at it, and loads it into the cluster.
    pub async fn of_demo(cluster: &Cluster, change: impl FnOnce(&Path) -> Result<()>) -> Result<Self> {
        let folder = tempfile::tempdir().context("making a folder for a model image")?;
        let root = folder.path().join("root");
        fs::create_dir(&root).context("making the image's root")?;
        let demo = repository().join("models/austen-2.6m");
        for entry in fs::read_dir(&demo).with_context(|| format!("reading {}", demo.display()))? {
            let entry = entry?;
            fs::copy(entry.path(), root.join(entry.file_name()))
                .with_context(|| format!("copying {}", entry.path().display()))?;
        }
        change(&root)?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("docker.io/local/e2e-model:{}-{number}", std::process::id());
        let archive = folder.path().join("model.tar");
        images::archive(&root, &name, json!({}), &archive)?;
        cluster.load_images(&[archive]).await?;
        Ok(Self { uri: format!("oci://{name}") })
    }
}

/// Changes `config.json` of a model folder.
pub fn edit_config(root: &Path, edit: impl FnOnce(&mut Map<String, Value>)) -> Result<()> {
    let path = root.join("config.json");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let mut config: Map<String, Value> = serde_json::from_str(&text).context("config.json is no object")?;
    edit(&mut config);
    fs::write(&path, Value::from(config).to_string()).with_context(|| format!("writing {}", path.display()))
}

/// Makes the model folder ask for about `bytes` of weights: a wider MLP, its weights all zero.
pub fn enlarge(root: &Path, bytes: u64) -> Result<()> {
    let mut shape = [0u64; 3];
    edit_config(root, |config| {
        let number = |key: &str| config.get(key).and_then(Value::as_u64).unwrap_or(0);
        shape = [number("hidden_size"), number("num_hidden_layers"), number("intermediate_size")];
        let [hidden, layers, _] = shape;
        // Three matrices of hidden × inner in each layer, two bytes an element.
        shape[2] = (bytes / (hidden.max(1) * layers.max(1) * 3 * 2)).next_multiple_of(32);
        config.insert("intermediate_size".into(), shape[2].into());
    })?;
    let [hidden, _, inner] = shape;
    let path = root.join("model.safetensors");
    let file = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let (length, rest) = file.split_at_checked(8).context("no safetensors header")?;
    let length = usize::try_from(u64::from_le_bytes(length.try_into()?))?;
    let header: Map<String, Value> = serde_json::from_slice(rest.get(..length).context("a short header")?)?;
    let mut offset = 0u64;
    let mut tensors = Map::new();
    for (name, mut tensor) in header.into_iter().filter(|(name, _)| name != "__metadata__") {
        if name.contains(".mlp.down_proj") {
            tensor["shape"] = json!([hidden, inner]);
        } else if name.contains(".mlp.") {
            tensor["shape"] = json!([inner, hidden]);
        }
        let width = if tensor["dtype"] == "F32" { 4 } else { 2 };
        let elements: u64 = tensor["shape"].as_array().into_iter().flatten().filter_map(Value::as_u64).product();
        tensor["data_offsets"] = json!([offset, offset + elements * width]);
        offset += elements * width;
        tensors.insert(name, tensor);
    }
    let header = Value::from(tensors).to_string();
    let mut start = (header.len() as u64).to_le_bytes().to_vec();
    start.extend_from_slice(header.as_bytes());
    fs::write(&path, &start).with_context(|| format!("writing {}", path.display()))?;
    let file = fs::OpenOptions::new().write(true).open(&path)?;
    file.set_len(start.len() as u64 + offset).context("enlarging the weights")
}
