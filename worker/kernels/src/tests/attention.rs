//! The paged cache and attention over it.

use half::{bf16, f16};
use proptest::prelude::*;

use super::guard::{Guarded, gathered, side, strided};
use super::{assert_close, assert_same, config, cpus, noise, reference};
use crate::{Attention, BLOCK_TOKENS, Cpu, KvCache, KvFormat, KvShape, Rows, RowsMut, Span};

/// A sequence with its keys, values and queries, `[length, heads · dim]` each.
struct Sequence {
    length: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
    queries: Vec<f32>,
    blocks: Vec<u32>,
}

#[derive(Clone, Debug)]
struct Case {
    lengths: Vec<usize>,
    kv_heads: usize,
    group: usize,
    dim: usize,
    window: Option<usize>,
    format: KvFormat,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    // Over the tile (64), the split (512) and the row block (48).
    let length = prop_oneof![4 => 1usize..80, 1 => 500usize..530, 1 => 1000usize..1100];
    let window = prop_oneof![3 => Just(None), 1 => (1usize..90).prop_map(Some)];
    let format = prop::sample::select(vec![KvFormat::F32, KvFormat::Bf16, KvFormat::F16]);
    (
        prop::collection::vec(length, 1..3),
        1usize..3,
        1usize..9,
        prop_oneof![2 => 1usize..40, 1 => Just(32), 1 => Just(64), 2 => Just(128)],
        window,
        format,
        any::<u64>(),
    )
        .prop_map(|(lengths, kv_heads, group, dim, window, format, seed)| Case {
            lengths,
            kv_heads,
            group,
            dim,
            window,
            format,
            seed,
        })
}

impl Case {
    fn heads(&self) -> usize {
        self.kv_heads * self.group
    }

    fn attention(&self) -> Attention {
        Attention { heads: self.heads(), scale: 1.0 / (self.dim as f32).sqrt(), window: self.window }
    }

    /// Sequences whose blocks lie in descending order.
    fn sequences(&self) -> Vec<Sequence> {
        let stored = |x: f32| match self.format {
            KvFormat::F32 => x,
            KvFormat::Bf16 => bf16::from_f32(x).to_f32(),
            KvFormat::F16 => f16::from_f32(x).to_f32(),
        };
        // From the last one down; block 0 stays free.
        let mut free = (1..self.blocks() as u32).rev();
        let width = self.kv_heads * self.dim;
        let mut sequences = Vec::new();
        for (number, &length) in self.lengths.iter().enumerate() {
            let seed = self.seed ^ (number as u64 + 1) << 32;
            sequences.push(Sequence {
                length,
                keys: noise(seed, length * width).iter().map(|&x| stored(x * 3.0)).collect(),
                values: noise(seed ^ 1, length * width).iter().map(|&x| stored(x)).collect(),
                queries: noise(seed ^ 2, length * self.heads() * self.dim).iter().map(|&x| x * 3.0).collect(),
                blocks: free.by_ref().take(length.div_ceil(BLOCK_TOKENS)).collect(),
            });
        }
        sequences
    }

    fn blocks(&self) -> usize {
        self.lengths.iter().map(|length| length.div_ceil(BLOCK_TOKENS)).sum::<usize>() + 1
    }

    /// A cache of two layers, full of NaN but for the sequences in layer 1.
    fn cache(&self, cpu: &Cpu, sequences: &[Sequence]) -> KvCache {
        let (kv_heads, head_dim) = (self.kv_heads, self.dim);
        let shape = KvShape { layers: 2, blocks: self.blocks(), kv_heads, head_dim, format: self.format };
        let mut cache = KvCache::new(shape).expect("memory");
        let width = kv_heads * head_dim;
        let everywhere: Vec<u32> = (0..(self.blocks() * BLOCK_TOKENS) as u32).collect();
        let nothing = vec![f32::NAN; everywhere.len() * width];
        for layer in 0..2 {
            cache.write(cpu, layer, &everywhere, Rows::new(&nothing, width), Rows::new(&nothing, width));
        }
        for sequence in sequences {
            let slot = |p: usize| sequence.blocks[p / BLOCK_TOKENS] * BLOCK_TOKENS as u32 + (p % BLOCK_TOKENS) as u32;
            let slots: Vec<u32> = (0..sequence.length).map(slot).collect();
            let keys = strided(&sequence.keys, width, width + 3, side());
            let values = Guarded::new(&sequence.values, side());
            let keys = Rows::strided(&keys, sequence.length, width, width + 3);
            cache.write(cpu, 1, &slots, keys, Rows::new(&values, width));
        }
        cache
    }

    /// Attention of the positions `from..` of each sequence, in one batch.
    fn attend(&self, cpu: &Cpu, cache: &KvCache, sequences: &[Sequence], from: &[usize]) -> Vec<Vec<f32>> {
        let width = self.heads() * self.dim;
        let (mut q, mut spans) = (Vec::new(), Vec::new());
        for (sequence, &from) in sequences.iter().zip(from) {
            spans.push(Span {
                row: q.len() / width,
                rows: sequence.length - from,
                start: from,
                blocks: &sequence.blocks,
            });
            q.extend(&sequence.queries[from * width..]);
        }
        let (rows, stride) = (q.len() / width, width + 1);
        let q = strided(&q, width, stride, side());
        let mut out = Guarded::poisoned(q.len(), side());
        let target = RowsMut::strided(&mut out, rows, width, stride);
        cache.attend(cpu, 1, &self.attention(), Rows::strided(&q, rows, width, stride), &spans, target);
        let out = gathered(&out, rows, width, stride);
        spans.iter().map(|span| out[span.row * width..(span.row + span.rows) * width].to_vec()).collect()
    }

    /// Whether queries and weights are rounded to bf16.
    fn rounds(&self, cpu: &Cpu) -> bool {
        cpu.tile_unit().is_some() && self.format == KvFormat::Bf16 && self.dim.is_multiple_of(32)
    }

    /// The result of one row as the formulas say, but for the rounding of weights.
    fn expected(&self, cpu: &Cpu, sequence: &Sequence, position: usize) -> Vec<f64> {
        let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let head_of = |numbers: &[f32], head: usize| -> Vec<f32> {
            let row = |row: &[f32]| row[head * self.dim..][..self.dim].to_vec();
            numbers.chunks_exact(self.kv_heads * self.dim).take(position + 1).skip(first).flat_map(row).collect()
        };
        let round = |&x: &f32| if self.rounds(cpu) { bf16::from_f32(x).to_f32() } else { x };
        let query = &sequence.queries[position * self.heads() * self.dim..][..self.heads() * self.dim];
        let query: Vec<f32> = query.iter().map(round).collect();
        let mut out = Vec::new();
        for (head, query) in query.chunks_exact(self.dim).enumerate() {
            let (keys, values) =
                (head_of(&sequence.keys, head / self.group), head_of(&sequence.values, head / self.group));
            out.extend(reference::attend(query, &keys, &values, self.attention().scale));
        }
        out
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..config() })]

    #[test]
    fn attention_is_the_weighted_mean_of_the_values_seen_and_chunks_do_not_change_its_bits(case in case(), cut in any::<u64>()) {
        let sequences = case.sequences();
        let width = case.heads() * case.dim;
        let mut same: [Option<Vec<Vec<f32>>>; 2] = [None, None];
        for cpu in cpus() {
            let cache = case.cache(cpu, &sequences);
            // The whole prompts at once.
            let whole = case.attend(cpu, &cache, &sequences, &vec![0; sequences.len()]);
            // A weight loses at most 2^-9 of itself.
            let tolerance = if case.rounds(cpu) { 4e-3 } else { 1e-5 };
            for (sequence, whole) in sequences.iter().zip(&whole) {
                for position in [0, sequence.length / 2, sequence.length - 1] {
                    let row = &whole[position * width..][..width];
                    assert_close(cpu, "attention", row, &case.expected(cpu, sequence, position), tolerance);
                }
            }
            if cpu.is_fused() {
                let same = same[usize::from(case.rounds(cpu))].get_or_insert_with(|| whole.clone());
                whole.iter().zip(same).for_each(|(whole, same)| assert_same(cpu, "another level", whole, same));
            }
            // A last chunk of any size, and the last token alone.
            let chunk: Vec<usize> = sequences.iter().map(|sequence| (cut % sequence.length as u64) as usize).collect();
            let last: Vec<usize> = sequences.iter().map(|sequence| sequence.length - 1).collect();
            for from in [chunk, last] {
                let part = case.attend(cpu, &cache, &sequences, &from);
                for ((part, whole), from) in part.iter().zip(&whole).zip(from) {
                    assert_same(cpu, "part", part, &whole[from * width..]);
                }
            }
        }
    }
}

fn small() -> (Case, Vec<Sequence>) {
    let case =
        Case { lengths: vec![40], kv_heads: 2, group: 2, dim: 32, window: None, format: KvFormat::Bf16, seed: 5 };
    let sequences = case.sequences();
    (case, sequences)
}

#[test]
fn a_copied_block_answers_like_its_original_in_every_layer() {
    let (case, mut sequences) = small();
    for cpu in cpus() {
        let mut cache = case.cache(cpu, &sequences);
        let expected = case.attend(cpu, &cache, &sequences, &[39]);
        let free = 0;
        cache.copy_block(sequences[0].blocks[1] as usize, free);
        let original = std::mem::replace(&mut sequences[0].blocks[1], free as u32);
        assert_same(cpu, "copy", &case.attend(cpu, &cache, &sequences, &[39])[0], &expected[0]);
        sequences[0].blocks[1] = original;
    }
}

#[test]
fn a_query_that_is_not_finite_spoils_no_other_row() {
    let (case, sequences) = small();
    let width = case.heads() * case.dim;
    for cpu in cpus() {
        let cache = case.cache(cpu, &sequences);
        let expected = case.attend(cpu, &cache, &sequences, &[0]);
        let mut spoiled = case.sequences();
        spoiled[0].queries[7 * width] = f32::NAN;
        let got = case.attend(cpu, &cache, &spoiled, &[0]);
        assert!(got[0][7 * width..][..case.dim].iter().all(|x| x.is_nan()));
        for row in (0..40).filter(|row| *row != 7) {
            assert_same(cpu, "row", &got[0][row * width..][..width], &expected[0][row * width..][..width]);
        }
    }
}

#[test]
#[should_panic(expected = "spans overlap")]
fn spans_that_overlap_are_refused() {
    let (case, sequences) = small();
    let cpu = &cpus()[0];
    let cache = case.cache(cpu, &sequences);
    let width = case.heads() * case.dim;
    let span = Span { row: 0, rows: 2, start: 0, blocks: &sequences[0].blocks };
    let (q, mut out) = (vec![0.0; 3 * width], vec![0.0; 3 * width]);
    let spans = [span, Span { row: 1, ..span }];
    cache.attend(cpu, 1, &case.attention(), Rows::new(&q, width), &spans, RowsMut::new(&mut out, width));
}

#[test]
#[should_panic(expected = "too few blocks")]
fn a_span_that_its_blocks_do_not_cover_is_refused() {
    let (case, sequences) = small();
    let cpu = &cpus()[0];
    let cache = case.cache(cpu, &sequences);
    let width = case.heads() * case.dim;
    let spans = [Span { row: 0, rows: 1, start: 64, blocks: &sequences[0].blocks }];
    let (q, mut out) = (vec![0.0; width], vec![0.0; width]);
    cache.attend(cpu, 1, &case.attention(), Rows::new(&q, width), &spans, RowsMut::new(&mut out, width));
}
