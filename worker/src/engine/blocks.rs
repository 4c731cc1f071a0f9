//! PURE: who holds which block of the key-value cache, and which blocks can be found again by their content.
//!
//! A block is free, or held by one or more sequences. A full block whose keys and values are computed may be
//! *published*: it is then found by sequences that begin with the same tokens, also while it is free, until it is taken
//! for something else. Free blocks are taken in the order in which they became free, those that were never published
//! first.
//!
//! Published blocks form chains: a block's key is a hash over its parent's key and its own tokens, keyed with a secret
//! of this process, so that nobody can make two contents collide; the tokens are compared on every hit all the same.

use std::collections::HashMap;

use crate::executor::BLOCK_TOKENS;

/// Names the content of a published block and of everything before it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct ChainKey([u8; 16]);

/// The blocks of one pool.
#[derive(Debug)]
pub struct Blocks {
    blocks: Vec<Block>,
    free: FreeList,
    published: HashMap<ChainKey, u32>,
    secret: [u8; 32],
}

#[derive(Debug, Default)]
struct Block {
    /// Sequences that hold it.
    holders: u32,
    /// What it contains, when it can be found.
    content: Option<Content>,
    /// Neighbours in the free list, for a free block.
    previous: Option<u32>,
    next: Option<u32>,
}

#[derive(Debug)]
struct Content {
    key: ChainKey,
    parent: ChainKey,
    tokens: [u32; BLOCK_TOKENS],
}

#[derive(Debug, Default)]
struct FreeList {
    /// The next to be taken.
    first: Option<u32>,
    last: Option<u32>,
    len: usize,
}

impl Blocks {
    /// A pool of `count` free blocks. `secret` keys the hashes.
    pub fn new(count: usize, secret: [u8; 32]) -> Self {
        let mut pool = Self {
            blocks: std::iter::repeat_with(Block::default).take(count).collect(),
            free: FreeList::default(),
            published: HashMap::new(),
            secret,
        };
        for id in 0..pool.blocks.len() {
            pool.push_last(id as u32);
        }
        pool
    }

    /// Blocks in the pool.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that nobody holds.
    pub fn free(&self) -> usize {
        self.free.len
    }

    /// The key that a chain of blocks starts from. Chains of different scopes never meet.
    pub fn root(&self, scope: &[&[u8]]) -> ChainKey {
        let mut hasher = blake3::Hasher::new_keyed(&self.secret);
        hasher.update(b"root");
        for part in scope {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        shorten(&hasher)
    }

    /// The key of a block with these tokens behind `parent`.
    pub fn key(&self, parent: ChainKey, tokens: &[u32; BLOCK_TOKENS]) -> ChainKey {
        let mut message = [0u8; 5 + 16 + 4 * BLOCK_TOKENS];
        message[..5].copy_from_slice(b"block");
        message[5..21].copy_from_slice(&parent.0);
        for (bytes, token) in message[21..].chunks_exact_mut(4).zip(tokens) {
            bytes.copy_from_slice(&token.to_le_bytes());
        }
        let mut hasher = blake3::Hasher::new_keyed(&self.secret);
        hasher.update(&message);
        shorten(&hasher)
    }

    /// The published block with this key, provided that it holds exactly these tokens behind `parent`.
    pub fn find(&self, key: ChainKey, parent: ChainKey, tokens: &[u32; BLOCK_TOKENS]) -> Option<u32> {
        let id = *self.published.get(&key)?;
        let content = self.blocks[id as usize].content.as_ref()?;
        (content.parent == parent && content.tokens == *tokens).then_some(id)
    }

    /// Whether nobody holds a block.
    pub fn is_free(&self, id: u32) -> bool {
        self.blocks[id as usize].holders == 0
    }

    /// Takes a free block for its first holder; what it held can no longer be found. `None`: none is free.
    pub fn take(&mut self) -> Option<u32> {
        let id = self.free.first?;
        self.unlink(id);
        let block = &mut self.blocks[id as usize];
        block.holders = 1;
        if let Some(content) = block.content.take() {
            self.published.remove(&content.key);
        }
        Some(id)
    }

    /// Adds a holder to a block that was [found](Self::find).
    pub fn share(&mut self, id: u32) {
        if self.is_free(id) {
            self.unlink(id);
        }
        self.blocks[id as usize].holders += 1;
    }

    /// Takes a holder from a block. Without holders it is free, and can be found for as long as it is not taken.
    ///
    /// To keep the beginnings of chains longest, release a sequence's blocks from the last to the first.
    pub fn release(&mut self, id: u32) {
        let block = &mut self.blocks[id as usize];
        debug_assert!(block.holders > 0, "block {id} is released more often than it was held");
        block.holders = block.holders.saturating_sub(1);
        if block.holders > 0 {
            return;
        }
        if block.content.is_some() { self.push_last(id) } else { self.push_first(id) }
    }

    /// Makes a held block, full and computed, findable. Where an equal block was published already, that one stays the
    /// one that is found.
    pub fn publish(&mut self, id: u32, key: ChainKey, parent: ChainKey, tokens: &[u32; BLOCK_TOKENS]) {
        if self.published.contains_key(&key) {
            return;
        }
        self.published.insert(key, id);
        let old = self.blocks[id as usize].content.replace(Content { key, parent, tokens: *tokens });
        if let Some(old) = old {
            self.published.remove(&old.key);
        }
    }

    /// Checks everything that must hold, given the blocks that each sequence holds.
    ///
    /// # Errors
    /// A sentence about the first thing that does not hold.
    pub fn audit<'a>(&self, held: impl Iterator<Item = &'a [u32]>) -> Result<(), String> {
        let mut holders = vec![0u32; self.blocks.len()];
        for sequence in held {
            for &id in sequence {
                *holders.get_mut(id as usize).ok_or(format!("block {id} does not exist"))? += 1;
            }
        }
        let mut free = 0;
        let mut findable = 0;
        for (id, (block, expected)) in self.blocks.iter().zip(holders).enumerate() {
            if block.holders != expected {
                return Err(format!("block {id} counts {} holders and has {expected}", block.holders));
            }
            free += usize::from(expected == 0);
            if let Some(content) = &block.content {
                findable += 1;
                if self.published.get(&content.key) != Some(&(id as u32)) {
                    return Err(format!("block {id} has content that is not found"));
                }
                if self.key(content.parent, &content.tokens) != content.key {
                    return Err(format!("the key of block {id} is not that of its tokens"));
                }
            }
        }
        if findable != self.published.len() {
            return Err(format!("{} blocks are published and {findable} have content", self.published.len()));
        }
        self.audit_free_list(free)
    }

    fn audit_free_list(&self, free: usize) -> Result<(), String> {
        let mut next = self.free.first;
        let mut previous = None;
        for _ in 0..free {
            let id = next.ok_or("the free list is too short")?;
            let block = &self.blocks[id as usize];
            if block.holders > 0 || block.previous != previous {
                return Err(format!("block {id} is out of place in the free list"));
            }
            (previous, next) = (Some(id), block.next);
        }
        if next.is_some() || self.free.last != previous || self.free.len != free {
            return Err(format!("the free list counts {} and {free} blocks are free", self.free.len));
        }
        Ok(())
    }

    fn push_last(&mut self, id: u32) {
        let last = self.free.last.replace(id);
        self.link(last, Some(id));
        self.link(Some(id), None);
        self.free.len += 1;
    }

    fn push_first(&mut self, id: u32) {
        let first = self.free.first.replace(id);
        self.link(None, Some(id));
        self.link(Some(id), first);
        self.free.len += 1;
    }

    fn unlink(&mut self, id: u32) {
        let block = &mut self.blocks[id as usize];
        let (previous, next) = (block.previous.take(), block.next.take());
        self.link(previous, next);
        self.free.len -= 1;
    }

    /// Makes two blocks neighbours in the free list; `None` is its end.
    fn link(&mut self, previous: Option<u32>, next: Option<u32>) {
        match previous {
            Some(id) => self.blocks[id as usize].next = next,
            None => self.free.first = next,
        }
        match next {
            Some(id) => self.blocks[id as usize].previous = previous,
            None => self.free.last = previous,
        }
    }
}

fn shorten(hasher: &blake3::Hasher) -> ChainKey {
    let mut key = [0; 16];
    key.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    ChainKey(key)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tokens(first: u32) -> [u32; BLOCK_TOKENS] {
        std::array::from_fn(|i| first + i as u32)
    }

    fn publish(pool: &mut Blocks, id: u32, parent: ChainKey, first: u32) -> ChainKey {
        let key = pool.key(parent, &tokens(first));
        pool.publish(id, key, parent, &tokens(first));
        key
    }

    #[test]
    fn the_pool_gives_each_block_once_and_then_none() {
        let mut pool = Blocks::new(3, [0; 32]);
        let taken: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(taken, [0, 1, 2]);
        assert_eq!((pool.free(), pool.take()), (0, None));
        pool.audit([taken.as_slice()].into_iter()).unwrap();
    }

    #[test]
    fn a_published_block_is_found_while_held_while_free_and_no_longer_once_taken() {
        let mut pool = Blocks::new(1, [0; 32]);
        let root = pool.root(&[]);
        let id = pool.take().unwrap();
        let key = publish(&mut pool, id, root, 7);
        assert_eq!(pool.find(key, root, &tokens(7)), Some(id));
        pool.release(id);
        assert_eq!(pool.find(key, root, &tokens(7)), Some(id));
        pool.share(id);
        assert_eq!(pool.free(), 0);
        pool.release(id);
        assert_eq!(pool.take(), Some(id));
        assert_eq!(pool.find(key, root, &tokens(7)), None);
    }

    #[test]
    fn a_shared_block_is_free_only_when_its_last_holder_releases_it() {
        let mut pool = Blocks::new(2, [0; 32]);
        let root = pool.root(&[]);
        let id = pool.take().unwrap();
        publish(&mut pool, id, root, 7);
        pool.share(id);
        pool.release(id);
        assert_eq!((pool.free(), pool.is_free(id)), (1, false));
        pool.release(id);
        assert_eq!((pool.free(), pool.is_free(id)), (2, true));
    }

    #[test]
    fn blocks_that_cannot_be_found_are_taken_first_then_the_least_recently_freed() {
        let mut pool = Blocks::new(4, [0; 32]);
        let root = pool.root(&[]);
        let ids: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        for &id in &ids[..3] {
            publish(&mut pool, id, root, id);
        }
        for id in [2, 0, 1, 3] {
            pool.release(id);
        }
        let again: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(again, [3, 2, 0, 1]);
    }

    #[test]
    fn of_two_equal_blocks_the_one_published_first_is_found() {
        let mut pool = Blocks::new(2, [0; 32]);
        let root = pool.root(&[]);
        let (a, b) = (pool.take().unwrap(), pool.take().unwrap());
        let key = publish(&mut pool, a, root, 7);
        assert_eq!(publish(&mut pool, b, root, 7), key);
        assert_eq!(pool.find(key, root, &tokens(7)), Some(a));
        pool.release(b);
        assert_eq!(pool.find(key, root, &tokens(7)), Some(a));
        pool.audit([[a].as_slice()].into_iter()).unwrap();
    }

    #[test]
    fn a_key_with_other_tokens_or_another_parent_is_no_hit() {
        let mut pool = Blocks::new(1, [0; 32]);
        let root = pool.root(&[]);
        let id = pool.take().unwrap();
        let key = publish(&mut pool, id, root, 7);
        assert_eq!(pool.find(key, root, &tokens(8)), None);
        assert_eq!(pool.find(key, pool.root(&[b"other"]), &tokens(7)), None);
    }

    #[test]
    fn scopes_are_told_apart_by_their_parts_not_by_their_concatenation() {
        let pool = Blocks::new(1, [0; 32]);
        let scopes: [&[&[u8]]; 6] = [&[], &[b""], &[b"ab"], &[b"a", b"b"], &[b"", b"ab"], &[b"ab", b""]];
        for (i, a) in scopes.iter().enumerate() {
            assert!(scopes[i + 1..].iter().all(|b| pool.root(a) != pool.root(b)), "{i}");
        }
    }

    #[test]
    fn keys_depend_on_the_secret_the_parent_and_every_token() {
        let pool = Blocks::new(1, [0; 32]);
        let root = pool.root(&[]);
        let key = pool.key(root, &tokens(7));
        assert_ne!(Blocks::new(1, [1; 32]).key(root, &tokens(7)), key);
        assert_ne!(pool.key(key, &tokens(7)), key);
        for place in 0..BLOCK_TOKENS {
            let mut other = tokens(7);
            other[place] ^= 1 << 31;
            assert_ne!(pool.key(root, &other), key, "token {place}");
        }
    }

    #[test]
    fn the_audit_notices_a_lost_and_a_doubly_held_block() {
        let mut pool = Blocks::new(2, [0; 32]);
        let id = pool.take().unwrap();
        assert!(pool.audit(std::iter::empty()).unwrap_err().contains("has 0"));
        assert!(pool.audit([[id].as_slice(), &[id]].into_iter()).unwrap_err().contains("has 2"));
        pool.audit([[id].as_slice()].into_iter()).unwrap();
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

        /// Any order of takes, shares, publications and releases keeps every invariant, and what is found holds the
        /// tokens that were looked for.
        #[test]
        fn no_sequence_of_operations_breaks_the_pool(count in 1usize..20, operations in prop::collection::vec((0u8..4, any::<u32>()), 0..200)) {
            let mut pool = Blocks::new(count, [3; 32]);
            let root = pool.root(&[]);
            // What is held, once for each holder.
            let mut held: Vec<u32> = Vec::new();
            let mut contents: HashMap<u32, u32> = HashMap::new();
            for (operation, pick) in operations {
                let one = (!held.is_empty()).then(|| pick as usize % held.len().max(1));
                match (operation, one) {
                    (0, _) => if let Some(id) = pool.take() {
                        prop_assert!(!held.contains(&id));
                        contents.remove(&id);
                        held.push(id);
                    },
                    (1, _) => {
                        let first = pick % 6;
                        if let Some(id) = pool.find(pool.key(root, &tokens(first)), root, &tokens(first)) {
                            prop_assert_eq!(contents.get(&id), Some(&first));
                            pool.share(id);
                            held.push(id);
                        }
                    }
                    (2, Some(one)) => {
                        let id = held[one];
                        // A block is published once, under its only content.
                        let first = *contents.entry(id).or_insert(pick % 6);
                        publish(&mut pool, id, root, first);
                    }
                    (3, Some(one)) => pool.release(held.swap_remove(one)),
                    _ => {}
                }
                prop_assert_eq!(pool.audit(held.iter().map(std::slice::from_ref)), Ok(()));
            }
        }
    }
}
