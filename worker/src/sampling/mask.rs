//! A set of tokens.

/// A set of token ids, one bit each.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Mask {
    words: Vec<u32>,
}

const BITS: usize = u32::BITS as usize;

impl Mask {
    /// The set whose words are these: id `32 w + b` is bit `b` of word `w`.
    pub fn from_words(words: Vec<u32>) -> Self {
        Self { words }
    }

    /// The set of these ids, of a vocabulary of `vocab`; ids beyond it are left out.
    pub fn of(ids: impl IntoIterator<Item = u32>, vocab: usize) -> Self {
        let mut words = vec![0; vocab.div_ceil(BITS)];
        for id in ids.into_iter().filter(|&id| (id as usize) < vocab) {
            words[id as usize / BITS] |= 1 << (id as usize % BITS);
        }
        Self { words }
    }

    /// Whether an id is in the set.
    pub fn allows(&self, id: u32) -> bool {
        self.words.get(id as usize / BITS).is_some_and(|word| word >> (id as usize % BITS) & 1 == 1)
    }

    /// Whether no id is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// How many ids are in the set.
    pub fn count(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Leaves out what is not in `other`.
    pub fn retain(&mut self, other: &Self) {
        for (index, word) in self.words.iter_mut().enumerate() {
            *word &= other.words.get(index).copied().unwrap_or(0);
        }
    }

    /// Whether all of it is in `other`.
    pub fn is_within(&self, other: &Self) -> bool {
        self.words.iter().enumerate().all(|(index, word)| word & !other.words.get(index).copied().unwrap_or(0) == 0)
    }

    /// Gives minus infinity to the logits `[vocab]` of all ids that are not in the set.
    pub fn apply(&self, logits: &mut [f32]) {
        for (index, chunk) in logits.chunks_mut(BITS).enumerate() {
            match self.words.get(index).copied().unwrap_or(0) {
                u32::MAX => {}
                0 => chunk.fill(f32::NEG_INFINITY),
                word => {
                    let left_out = chunk.iter_mut().enumerate().filter(|(bit, _)| word >> bit & 1 == 0);
                    left_out.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_logits_of_the_set_are_left() {
        for vocab in [1usize, 31, 32, 33, 100] {
            let ids = |keep: fn(u32) -> bool| (0..vocab as u32).filter(move |&id| keep(id));
            for keep in [|_| true, |_| false, |id| id % 3 == 0, |id| id == 0] as [fn(u32) -> bool; 4] {
                let mask = Mask::of(ids(keep), vocab);
                let mut logits: Vec<f32> = (0..vocab).map(|id| id as f32).collect();
                mask.apply(&mut logits);
                for (id, logit) in (0u32..).zip(logits) {
                    assert_eq!(mask.allows(id), keep(id));
                    assert_eq!(logit, if keep(id) { id as f32 } else { f32::NEG_INFINITY });
                }
                assert_eq!((mask.count(), mask.is_empty()), (ids(keep).count(), ids(keep).count() == 0));
            }
        }
    }

    #[test]
    fn ids_beyond_a_set_are_not_in_it() {
        let mut mask = Mask::of([1, 40, 1000], 64);
        assert!(mask.allows(40) && !mask.allows(1000) && !mask.allows(u32::MAX));
        let mut logits = [0.0; 100];
        mask.apply(&mut logits);
        assert_eq!(logits.iter().filter(|logit| logit.is_finite()).count(), 2);
        assert!(!mask.is_within(&Mask::of([40], 64)));
        mask.retain(&Mask::of([40], 41));
        assert!(mask.is_within(&Mask::of([40, 41], 64)) && mask == Mask::from_words(vec![0, 1 << 8]));
    }
}
