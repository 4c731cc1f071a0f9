//! PURE: one request's life, as far as scheduling is concerned.

use crate::executor::BLOCK_TOKENS;

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

    /// The published blocks that hold this sequence's beginning, appended to `found`. The last token is never covered:
    /// it must run for its logits.
    pub(super) fn find_prefix(&mut self, pool: &Blocks, found: &mut Vec<u32>) {
        let Some(chain) = &mut self.chain else { return };
        let usable = self.tokens.len().saturating_sub(1) / BLOCK_TOKENS;
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
