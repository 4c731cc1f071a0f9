//! The safetensors files that `eval` reads and writes.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, View};

use super::evaluate::{Evaluation, Sequence};

/// The largest input file, in bytes.
const INPUT_LIMIT: u64 = 64 << 20;

/// What an input file holds.
#[derive(Debug)]
pub(super) struct Input {
    /// At least one.
    pub(super) sequences: Vec<Sequence>,
    /// Whether their names are numbered, as those of the results will be.
    pub(super) numbered: bool,
}

/// Reads an input file. Errors are sentences.
pub(super) fn read(path: &Path) -> Result<Input, String> {
    let shown = path.display();
    let length = std::fs::metadata(path).map_err(|error| format!("cannot read {shown}: {error}"))?.len();
    if length > INPUT_LIMIT {
        return Err(format!("{shown} has {length} bytes, more than the {INPUT_LIMIT} that are read"));
    }
    let bytes = std::fs::read(path).map_err(|error| format!("cannot read {shown}: {error}"))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|error| format!("{shown} is no safetensors file: {error}"))?;
    let sequence = |suffix: &str| -> Result<Sequence, String> {
        let ids = numbers(&file, &format!("input_ids{suffix}"))?
            .ok_or_else(|| format!("{shown} has no tensor input_ids{suffix}"))?;
        let positions = numbers(&file, &format!("position_ids{suffix}"))?;
        if ids.is_empty() {
            return Err(format!("{shown}: input_ids{suffix} is empty"));
        }
        match &positions {
            Some(positions) if positions.len() != ids.len() => {
                Err(format!("{shown}: position_ids{suffix} has {} numbers for {} ids", positions.len(), ids.len()))
            }
            _ => Ok(Sequence { ids, positions }),
        }
    };
    let numbered = file.tensor("input_ids").is_err();
    let suffixes: Vec<String> = if numbered {
        let suffixes = (0..).map(|index| format!(".{index}"));
        suffixes.take_while(|suffix| file.tensor(&format!("input_ids{suffix}")).is_ok()).collect()
    } else {
        vec![String::new()]
    };
    if suffixes.is_empty() {
        return Err(format!("{shown} has neither input_ids nor input_ids.0"));
    }
    let known: HashSet<&str> = suffixes.iter().map(String::as_str).collect();
    if let Some(name) = file.names().into_iter().find(|name| is_left_over(name, &known)) {
        let remedy = "number sequences from 0 without a gap, or name a single one input_ids";
        return Err(format!("{shown}: {name} belongs to no sequence: {remedy}"));
    }
    let sequences = suffixes.iter().map(|suffix| sequence(suffix)).collect::<Result<_, _>>()?;
    Ok(Input { sequences, numbered })
}

/// Whether a tensor looks like part of an input and is none of the sequences that are read.
fn is_left_over(name: &str, suffixes: &HashSet<&str>) -> bool {
    let suffix = name.strip_prefix("input_ids").or_else(|| name.strip_prefix("position_ids"));
    suffix.is_some_and(|suffix| !suffixes.contains(suffix))
}

/// The whole numbers of a tensor, if it is there.
fn numbers(file: &SafeTensors<'_>, name: &str) -> Result<Option<Vec<u32>>, String> {
    let Ok(tensor) = file.tensor(name) else { return Ok(None) };
    if tensor.dtype() != Dtype::I64 || tensor.shape().len() != 1 {
        return Err(format!(
            "{name} must be one-dimensional I64, not {:?} of shape {:?}",
            tensor.dtype(),
            tensor.shape()
        ));
    }
    let (chunks, _) = tensor.data().as_chunks::<8>();
    let numbers = chunks.iter().map(|bytes| {
        let number = i64::from_le_bytes(*bytes);
        u32::try_from(number).map_err(|_| format!("{name} holds {number}, which is no token id or position"))
    });
    numbers.collect::<Result<_, _>>().map(Some)
}

/// A tensor that is written.
enum Output {
    Floats(Vec<usize>, Vec<f32>),
    Integers(Vec<usize>, Vec<u32>),
}

impl View for Output {
    fn dtype(&self) -> Dtype {
        match self {
            Output::Floats(..) => Dtype::F32,
            Output::Integers(..) => Dtype::I64,
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Output::Floats(shape, _) | Output::Integers(shape, _) => shape,
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Output::Floats(_, values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Output::Integers(_, values) => values.iter().flat_map(|&value| i64::from(value).to_le_bytes()).collect(),
        }
    }

    fn data_len(&self) -> usize {
        match self {
            Output::Floats(_, values) => values.len() * 4,
            Output::Integers(_, values) => values.len() * 8,
        }
    }
}

/// Writes the results of a run; when `numbered`, every name ends in the sequence's number. Errors are sentences.
pub(super) fn write(path: &Path, results: Vec<Evaluation>, numbered: bool, vocab: usize) -> Result<(), String> {
    let mut tensors = BTreeMap::new();
    for (index, result) in results.into_iter().enumerate() {
        let suffix = if numbered { format!(".{index}") } else { String::new() };
        for (name, tensor) in named(result, vocab) {
            tensors.insert(format!("{name}{suffix}"), tensor);
        }
    }
    safetensors::serialize_to_file(tensors, None, path)
        .map_err(|error| format!("cannot write {}: {error}", path.display()))
}

/// The tensors of one sequence.
fn named(result: Evaluation, vocab: usize) -> Vec<(String, Output)> {
    let rows = |values: Vec<f32>, width: usize| Output::Floats(vec![values.len() / width.max(1), width], values);
    let mut tensors = vec![("logits".to_owned(), rows(result.logits, vocab))];
    if !result.greedy_tokens.is_empty() {
        let tokens = Output::Integers(vec![result.greedy_tokens.len()], result.greedy_tokens);
        tensors.push(("greedy.tokens".to_owned(), tokens));
        tensors.push(("greedy.logits".to_owned(), rows(result.greedy_logits, vocab)));
    }
    let count = result.trace.count;
    for (name, values) in result.trace.activations {
        let width = values.len() / count.max(1);
        tensors.push((name, rows(values, width)));
    }
    for router in result.trace.routers {
        let (name, width) = (format!("router.{}", router.layer), router.logits.len() / count.max(1));
        let index = Output::Integers(vec![count, router.routes.active], router.routes.index);
        tensors.push((format!("{name}.logits"), rows(router.logits, width)));
        tensors.push((format!("{name}.index"), index));
        tensors.push((format!("{name}.weight"), rows(router.routes.weight, router.routes.active)));
    }
    tensors
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(tensors: &[(&str, &[u32])]) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("in.safetensors");
        let tensors: BTreeMap<_, _> = tensors
            .iter()
            .map(|(name, ids)| ((*name).to_owned(), Output::Integers(vec![ids.len()], ids.to_vec())))
            .collect();
        safetensors::serialize_to_file(tensors, None, &path).expect("written");
        (folder, path)
    }

    #[test]
    fn a_batch_is_read_in_the_order_of_its_numbers() {
        let (_folder, path) =
            file(&[("input_ids.1", &[4]), ("input_ids.0", &[1, 2, 3]), ("position_ids.0", &[0, 5, 9])]);
        let Input { sequences, numbered } = read(&path).expect("read");
        assert!(numbered);
        assert_eq!(sequences[0], Sequence { ids: vec![1, 2, 3], positions: Some(vec![0, 5, 9]) });
        assert_eq!(sequences[1], Sequence { ids: vec![4], positions: None });
    }

    #[test]
    fn inputs_that_cannot_be_run_are_refused_by_name() {
        for (tensors, expected) in [
            (&[("ids", &[1][..])][..], "neither input_ids"),
            (&[("input_ids", &[])], "empty"),
            (&[("input_ids", &[1, 2]), ("position_ids", &[0])], "1 numbers for 2 ids"),
            (&[("input_ids.0", &[1]), ("input_ids.2", &[1])], "input_ids.2 belongs to no sequence"),
            (&[("input_ids.0", &[1]), ("position_ids.1", &[0])], "position_ids.1 belongs to no sequence"),
            (&[("input_ids", &[1]), ("input_ids.0", &[1])], "input_ids.0 belongs to no sequence"),
        ] {
            let (_folder, path) = file(tensors);
            let error = read(&path).expect_err("refused");
            assert!(error.contains(expected), "{error}");
        }
    }
}
