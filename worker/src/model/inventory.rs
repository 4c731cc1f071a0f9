//! Looks at a checkpoint by assembling the model without reading it: completeness, shapes and bytes.

use std::cell::Cell;

use super::BackendChoice;
use super::adapter::Adapter;
use super::checkpoint::Checkpoint;
use super::dtype::Dtype;
use super::ernie::Decoder;
use super::error::{LoadError, LoadResult};
use super::pack::{MatrixSource, Pack, Precision};
use super::quantization::Quantization;
use super::weights::{Part, Weights};

/// How a backend keeps weights.
#[derive(Clone, Copy, Debug)]
pub struct Keeping {
    /// The format of those that are not quantised.
    pub dtype: Dtype,
    /// What becomes of the others.
    pub quantization: Quantization,
    /// What keeps them: candle has quantised numbers in single precision.
    pub backend: BackendChoice,
}

impl Keeping {
    /// As a checkpoint has them.
    fn plain(checkpoint: &Checkpoint) -> Self {
        Self { dtype: checkpoint.dtype, quantization: Quantization::None, backend: BackendChoice::Cpu }
    }
}

/// Sums the bytes of what a backend would hold.
#[derive(Debug)]
struct Inventory {
    keeping: Keeping,
    bytes: Cell<u64>,
}

impl Inventory {
    fn add(&self, numbers: usize, precision: Precision) {
        let size = if precision == Precision::Single { 4 } else { self.keeping.dtype.bytes() };
        self.bytes.set(self.bytes.get() + numbers as u64 * size as u64);
    }

    fn new(keeping: Keeping) -> Self {
        Self { keeping, bytes: Cell::new(0) }
    }
}

impl Pack for Inventory {
    type Matrix = ();
    type Vector = ();

    fn matrix(&self, source: &MatrixSource<'_>) -> LoadResult<()> {
        let (outputs, inputs) = (source.outputs(), source.inputs());
        match (self.keeping.quantization.format(source.precision), self.keeping.backend) {
            (None, _) => self.add(outputs * inputs, source.precision),
            (Some(_), BackendChoice::Candle) => self.add(outputs * inputs, Precision::Single),
            (Some(format), BackendChoice::Cpu) => {
                self.bytes.set(self.bytes.get() + format.bytes(source.layout, outputs, inputs) as u64);
            }
        }
        Ok(())
    }

    fn vector(&self, parts: &[Part<'_>]) -> LoadResult<()> {
        parts.iter().for_each(|part| self.add(part.numbers(), Precision::Single));
        Ok(())
    }

    fn matrix_of(&self, numbers: Vec<f32>, _: usize) -> LoadResult<()> {
        self.add(numbers.len(), Precision::Single);
        Ok(())
    }

    fn numbers(&self, part: &Part<'_>) -> LoadResult<Vec<f32>> {
        self.add(part.numbers(), Precision::Single);
        Ok(vec![0.0; part.numbers()])
    }
}

/// Bytes of a checkpoint's weights in memory.
///
/// # Errors
/// [`LoadError`] when the checkpoint is not what its config describes.
pub fn weight_bytes(checkpoint: &Checkpoint, keeping: Keeping) -> LoadResult<u64> {
    let inventory = Inventory::new(keeping);
    Decoder::assemble(&checkpoint.config, &Weights::new(&checkpoint.tensors, &|_| {}), &inventory)?;
    Ok(inventory.bytes.get())
}

/// Checks that adapters fit a checkpoint, reading neither's weights.
///
/// # Errors
/// [`LoadError`] that names the adapter and the tensor.
pub fn check_adapters(checkpoint: &Checkpoint, adapters: &[Adapter]) -> LoadResult<()> {
    if adapters.is_empty() {
        return Ok(());
    }
    let inventory = Inventory::new(Keeping::plain(checkpoint));
    let tensors = Weights::new(&checkpoint.tensors, &|_| {});
    let mut decoder = Decoder::assemble(&checkpoint.config, &tensors, &inventory)?;
    adapters.iter().zip(0..).try_for_each(|(adapter, index)| {
        let weights = Weights::new(&adapter.tensors, &|_| {});
        adapter.attach(index, &checkpoint.config, &mut decoder, &weights, &inventory).map(drop)
    })
}

/// Checks that the tensors are those of the config: none missing, none of another shape, none that has no place.
pub(super) fn check(checkpoint: &mut Checkpoint) -> LoadResult<()> {
    let tensors = Weights::new(&checkpoint.tensors, &|_| {});
    let inventory = Inventory::new(Keeping::plain(checkpoint));
    Decoder::assemble(&checkpoint.config, &tensors, &inventory)?;
    let (unused, extra): (Vec<_>, Vec<_>) =
        tensors.unclaimed().into_iter().partition(|name| is_unused(checkpoint, name));
    if let Some(name) = extra.first() {
        let place = &checkpoint.tensors.places[*name];
        return Err(LoadError::corrupt(format!(
            "{}: tensor {name:?} of shape {:?} has no place in the model that config.json describes{}",
            checkpoint.tensors.files[place.file].display(),
            place.shape,
            if extra.len() > 1 { format!(" (and {} more)", extra.len() - 1) } else { String::new() }
        )));
    }
    if !unused.is_empty() {
        let warning = format!("{} tensors are not used: {}", unused.len(), unused[..unused.len().min(4)].join(", "));
        checkpoint.warnings.push(warning);
    }
    Ok(())
}

/// Tensors that a checkpoint may have although the model does without: the heads for multi-token prediction, a copy of
/// the tied head, and rotary tables of old writers.
fn is_unused(checkpoint: &Checkpoint, name: &str) -> bool {
    name.starts_with("model.mtp_")
        || name.ends_with(".rotary_emb.inv_freq")
        || (checkpoint.config.tie_word_embeddings && name == "lm_head.weight")
}
