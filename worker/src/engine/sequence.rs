//! PURE: one request's life, as far as scheduling is concerned.

use std::ops::Range;

use crate::executor::{BLOCK_TOKENS, Reading};

use super::blocks::{Blocks, ChainKey};

/// Names a sequence while it lives; used again for another one afterwards.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct SequenceId(pub usize);

/// Order of service, smallest first: arrival, shifted by priority. It never changes, so whoever waits is overtaken only
/// by those whose priority makes up for their later arrival.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Rank {
    /// Microseconds on the engine's clock.
    pub(super) micros: i64,
    /// Order of arrival; tells equals apart.
    pub(super) serial: u64,
}

/// Tokens of one prompt and its answer, and where its keys and values are.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) tokens: Vec<u32>,
    pub(super) positions: Option<Positions>,
    pub(super) adapter: Option<u32>,
    pub(super) rank: Rank,
    /// Key in the queue's table of tenants.
    pub(super) tenant: usize,
    /// `None`: takes no part in the prefix cache.
    pub(super) chain: Option<Chain>,
    /// What is still to be read off its prompt's rows.
    pub(super) reading: Option<RowReading>,
    /// Whether a token is sampled once all of it is in the cache.
    pub(super) generates: bool,
    /// Its reader is behind; no step until it caught up.
    pub(super) paused: bool,
    /// Whether it ever ran.
    pub(super) started: bool,
    pub(super) stage: Stage,
}

/// Where a sequence is in its life. The end is its removal.
#[derive(Debug)]
pub(super) enum Stage {
    /// Has never run, or was preempted: holds nothing.
    Waiting,
    /// Holds blocks.
    Running(Residence),
}

/// What a running sequence has in the cache.
#[derive(Debug)]
pub(super) struct Residence {
    /// The blocks it holds, in order; at least enough for `computed` tokens.
    pub(super) blocks: Vec<u32>,
    /// Tokens whose keys and values are in the cache.
    pub(super) computed: usize,
    /// Leading blocks that were published, or were found published.
    pub(super) published: usize,
}

/// What is read off rows of a prompt as they are computed, each once, however often they are computed.
#[derive(Clone, Debug, PartialEq)]
pub struct RowReading {
    /// The rows that have not been read yet, by their places in the sequence.
    pub rows: Range<usize>,
    /// What is read off them.
    pub kind: RowReadingKind,
}

/// See [`RowReading`].
#[derive(Clone, Debug, PartialEq)]
pub enum RowReadingKind {
    /// How probable the token that follows each row is.
    Scores {
        /// How many of the best tokens come beside it.
        top: u32,
    },
    /// The sum of the hidden states.
    HiddenSum {
        /// That of the rows read so far; empty before the first.
        sum: Vec<f64>,
    },
}

impl RowReading {
    /// What a step that runs the rows `start..end` of `tokens` reads.
    pub(super) fn of_step(&self, start: usize, end: usize, tokens: &[u32]) -> Option<Reading> {
        let rows = self.rows.start.max(start)..self.rows.end.min(end);
        if rows.is_empty() {
            return None;
        }
        // Bounded by the context, which fits.
        let first = (rows.start - start) as u32;
        Some(match &self.kind {
            RowReadingKind::Scores { top } => {
                Reading::Scores { first, targets: tokens[rows.start + 1..rows.end + 1].to_vec(), top: *top }
            }
            RowReadingKind::HiddenSum { sum } => {
                Reading::HiddenSum { first, rows: rows.len() as u32, onto: sum.clone() }
            }
        })
    }
}

/// Rotary positions that are not simply `0..`.
#[derive(Debug)]
pub(super) struct Positions {
    prompt: Vec<u32>,
    next: u32,
}

/// Keys of the sequence's full blocks, worked out once.
#[derive(Debug)]
pub(super) struct Chain {
    /// The root, then one key for each full block.
    keys: Vec<ChainKey>,
}

impl Sequence {
    /// Tokens that are not in the cache yet; 1 for a sequence that decodes.
    pub(super) fn missing(&self) -> usize {
        self.tokens.len() - self.computed()
    }

    /// Whether rows from `start` on are scored, each of which costs a row of logits.
    pub(super) fn scores_after(&self, start: usize) -> bool {
        let scores = |reading: &RowReading| {
            matches!(reading.kind, RowReadingKind::Scores { .. }) && reading.rows.end > start.max(reading.rows.start)
        };
        self.reading.as_ref().is_some_and(scores)
    }

    pub(super) fn computed(&self) -> usize {
        match &self.stage {
            Stage::Waiting => 0,
            Stage::Running(residence) => residence.computed,
        }
    }

    pub(super) fn blocks(&self) -> &[u32] {
        match &self.stage {
            Stage::Waiting => &[],
            Stage::Running(residence) => &residence.blocks,
        }
    }

    /// The published blocks that hold this sequence's beginning, appended to `found`. Rows that something is still to be
    /// read off are never covered, nor is the last one: they must run.
    pub(super) fn find_prefix(&mut self, pool: &Blocks, found: &mut Vec<u32>) {
        let Some(chain) = &mut self.chain else { return };
        let reading = self.reading.as_ref().filter(|reading| !reading.rows.is_empty());
        let last = self.tokens.len().saturating_sub(1);
        let usable = reading.map_or(last, |reading| reading.rows.start.min(last)) / BLOCK_TOKENS;
        chain.extend(pool, &self.tokens, usable);
        let links = chain.keys.windows(2).zip(self.tokens.as_chunks::<BLOCK_TOKENS>().0).take(usable);
        found.extend(links.map_while(|(keys, tokens)| pool.find(keys[1], keys[0], tokens)));
    }

    /// Publishes the blocks that have become full and computed.
    pub(super) fn publish(&mut self, pool: &mut Blocks) {
        let (Some(chain), Stage::Running(residence)) = (&mut self.chain, &mut self.stage) else { return };
        let full = residence.computed / BLOCK_TOKENS;
        if full == residence.published {
            return;
        }
        chain.extend(pool, &self.tokens, full);
        let links = chain.keys.windows(2).zip(self.tokens.as_chunks::<BLOCK_TOKENS>().0);
        for (&block, (keys, tokens)) in residence.blocks[..full].iter().zip(links).skip(residence.published) {
            pool.publish(block, keys[1], keys[0], tokens);
        }
        residence.published = full;
    }
}

impl Chain {
    pub(super) fn new(root: ChainKey) -> Self {
        Self { keys: vec![root] }
    }

    /// Works out the keys of the first `count` blocks, all of them full.
    fn extend(&mut self, pool: &Blocks, tokens: &[u32], count: usize) {
        let blocks = tokens.as_chunks::<BLOCK_TOKENS>().0;
        for block in blocks.iter().take(count).skip(self.keys.len() - 1) {
            let parent = self.keys[self.keys.len() - 1];
            self.keys.push(pool.key(parent, block));
        }
    }
}

impl Positions {
    /// Those of the prompt; later tokens count on from the largest.
    pub(super) fn new(prompt: Vec<u32>) -> Self {
        let next = prompt.iter().max().map_or(0, |largest| largest.saturating_add(1));
        Self { prompt, next }
    }

    /// Of the tokens `start..start + count`.
    pub(super) fn range(&self, start: usize, count: usize) -> Vec<u32> {
        let position = |index: usize| match self.prompt.get(index) {
            Some(&position) => position,
            // Bounded by the context, which fits.
            None => self.next.saturating_add((index - self.prompt.len()) as u32),
        };
        (start..start + count).map(position).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_go_on_from_the_largest_of_the_prompt() {
        let positions = Positions::new(vec![0, 1, 1, 1, 2]);
        assert_eq!(positions.range(1, 6), [1, 1, 1, 2, 3, 4]);
        assert_eq!(positions.range(7, 2), [5, 6]);
    }
}
