//! Perplexity of a file of texts.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use ernie_proto::failure::TerminationMessage;
use serde::{Deserialize, Serialize};

use super::evaluate::{Sequence, Settings};
use super::serving::{Computed, Serving, Wanted};
use super::{EvalArgs, Sizes, failed, load, message, step_tokens, usage};
use crate::engine::scheduler::Bounds;
use crate::executor::{BLOCK_TOKENS, LogitRows};
use crate::model::Checkpoint;
use crate::tokenizer::Tokenizer;

/// The longest line, in bytes.
const LINE_LIMIT: u64 = 16 << 20;

/// One line of the file.
#[derive(Deserialize)]
struct Line {
    text: Option<String>,
    ids: Option<Vec<u32>>,
}

/// What is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Score {
    /// Tokens that were predicted.
    tokens: usize,
    /// −Σ ln p over them.
    nll: f64,
    /// e^(nll / tokens).
    perplexity: f64,
}

/// Scores every line and prints the sum.
pub(super) fn run(args: &EvalArgs, checkpoint: &Checkpoint, file: &Path) -> Result<(), TerminationMessage> {
    let sequences = read(checkpoint, file)?;
    let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
    let vocab = checkpoint.config.vocab_size;
    let settings = Settings {
        chunk: args.chunk.unwrap_or(usize::MAX),
        step_tokens: step_tokens(args.chunk, LogitRows::All, vocab),
        ..Settings::default()
    };
    // Every row is to be computed, also of lines that begin alike.
    let bounds = Bounds { prefix_caching: false, ..settings.bounds(1) };
    let sizes = Sizes { longest, blocks: longest.div_ceil(BLOCK_TOKENS), bounds };
    let mut executor = load(args, checkpoint, &sizes)?;
    let wanted = Wanted { generate: 0, rows: LogitRows::All, trace: false, adapter: args.adapter.is_some() };
    let mut serving = Serving::new(&mut executor, bounds, wanted);
    let mut score = Score::default();
    for ids in sequences {
        let sequence = [Sequence { ids, positions: None }];
        let mut add = |computed: Computed<'_>| {
            let targets = &sequence[0].ids[computed.step.start as usize + 1..];
            let rows = computed.logits.chunks_exact(vocab);
            score.nll += rows.zip(targets).map(|(row, &target)| surprise(row, target)).sum::<f64>();
            Ok(())
        };
        serving.round(&sequence, &mut add).map_err(|error| failed(&error))?;
        score.tokens += sequence[0].ids.len() - 1;
    }
    score.perplexity = (score.nll / score.tokens as f64).exp();
    let text = if args.json {
        serde_json::to_string(&score).unwrap_or_default()
    } else {
        format!("perplexity {:.4} over {} tokens (nll {:.4})", score.perplexity, score.tokens, score.nll)
    };
    println!("{text}");
    Ok(())
}

/// −ln p of a token.
fn surprise(row: &[f32], token: u32) -> f64 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    f64::from(max) + sum.ln() - f64::from(row[token as usize])
}

/// The token ids of every line; a text is preceded by the beginning-of-sequence token.
fn read(checkpoint: &Checkpoint, path: &Path) -> Result<Vec<Vec<u32>>, TerminationMessage> {
    let vocab = checkpoint.config.vocab_size;
    let file = File::open(path).map_err(|error| usage(format!("cannot read {}: {error}", path.display())))?;
    let mut reader = BufReader::new(file);
    let mut tokenizer = None;
    let mut sequences = Vec::new();
    for number in 1.. {
        let wrong = |what: String| usage(format!("{}, line {number}: {what}", path.display()));
        let mut text = String::new();
        let read = reader.by_ref().take(LINE_LIMIT).read_line(&mut text).map_err(|error| wrong(error.to_string()))?;
        if read == 0 {
            break;
        }
        if text.trim().is_empty() {
            continue;
        }
        let line: Line = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        let ids = match (line.ids, line.text) {
            (Some(ids), None) => ids,
            (None, Some(text)) => {
                if tokenizer.is_none() {
                    let loaded = Tokenizer::load(&checkpoint.path, vocab);
                    tokenizer = Some(loaded.map_err(|error| message(error.reason(), error.to_string()))?);
                }
                let ids = tokenizer.as_ref().map(|tokenizer| tokenizer.encode(&text)).transpose();
                let ids = ids.map_err(|error| wrong(error.to_string()))?.unwrap_or_default();
                checkpoint.generation.bos_token_id.into_iter().chain(ids).collect()
            }
            _ => return Err(wrong("must have either \"text\" or \"ids\"".to_owned())),
        };
        if ids.len() < 2 {
            return Err(wrong("has nothing to predict: two tokens at least".to_owned()));
        }
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(wrong(format!("token id {id} is beyond the vocabulary of {vocab}")));
        }
        sequences.push(ids);
    }
    if sequences.is_empty() {
        return Err(usage(format!("{} has no lines", path.display())));
    }
    Ok(sequences)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uniform_row_surprises_by_the_logarithm_of_its_length() {
        assert!((surprise(&[3.0; 8], 5) - 8f64.ln()).abs() < 1e-12);
        assert!((surprise(&[1000.0, 0.0], 1) - 1000.0).abs() < 1e-9);
    }
}
