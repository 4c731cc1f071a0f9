//! Every golden folder through the scheduler in every way that it can run a sequence: alone, in a batch, in chunks,
//! preempted, and behind a beginning found in the prefix cache.

use ernie_worker::eval::evaluate::{Evaluation, Rows, Sequence, Settings, evaluate};
use ernie_worker::model::{DtypeChoice, ModelExecutor};

use crate::reference::{
    DENSE, Engine, F32, MOE, Reference, adapter, assert_routes, folder, is_bf16, near, near_greedy_bf16, single,
};

/// A checkpoint as it is loaded, and the reference's numbers for that.
pub(crate) struct Case {
    engine: Engine,
    pub(crate) name: &'static str,
    dtype: DtypeChoice,
    pub(crate) adapter: Option<&'static str>,
    pub(crate) reference: Reference,
    /// What the prompt, and the prompt at uneven positions, give alone. Stands for numbers that the reference lacks.
    alone: Vec<Evaluation>,
}

impl Case {
    /// Every folder, bf16 ones also computed in f32, and every adapter.
    pub(crate) fn all(engine: Engine) -> Vec<Case> {
        let case = |name, dtype, adapter| Case::new(engine, name, dtype, adapter);
        let folders = DENSE.into_iter().chain(MOE);
        let mut cases: Vec<Case> = folders.clone().map(|name| case(name, DtypeChoice::Auto, None)).collect();
        cases.extend(folders.filter(|name| is_bf16(name)).map(|name| case(name, DtypeChoice::Float32, None)));
        let adapters = ["adapter", "adapter-qv", "adapter-rslora"];
        cases.extend(adapters.map(|adapter| case("dense-lora", DtypeChoice::Auto, Some(adapter))));
        cases
    }

    fn new(engine: Engine, name: &'static str, dtype: DtypeChoice, adapter: Option<&'static str>) -> Case {
        let mut case = Case { engine, name, dtype, adapter, reference: Reference::of(name), alone: Vec::new() };
        let mut executor = case.load(engine, 8);
        for sequence in [case.reference.prompt(), case.reference.gap_prompt()] {
            case.alone.push(single(&mut executor, &sequence, &case.settings(40)));
        }
        case
    }

    pub(crate) fn what(&self, engine: Engine, mode: &str) -> String {
        let adapter = self.adapter.unwrap_or("no adapter");
        format!("{} {:?} {adapter} {engine:?} {mode}", self.name, self.dtype)
    }

    /// Whether the reference computed these numbers in bf16.
    fn in_bf16(&self) -> bool {
        is_bf16(self.name) && self.dtype == DtypeChoice::Auto
    }

    pub(crate) fn load(&self, engine: Engine, blocks: usize) -> ModelExecutor {
        engine.load_with(&folder(self.name), |options| {
            options.dtype = self.dtype;
            options.kv = ernie_worker::model::KvSize::Blocks(blocks);
            options.max_model_len = Some(96);
            options.adapters = self.adapter.iter().map(|name| adapter(name)).collect();
        })
    }

    pub(crate) fn settings(&self, generate: usize) -> Settings {
        Settings { generate, trace: true, adapter: self.adapter.is_some(), ..Settings::default() }
    }

    /// The reference's continuation of the prompt.
    fn greedy(&self) -> Vec<u32> {
        self.reference.numbers(&match self.adapter {
            Some(name) => format!("lora.{name}.greedy.tokens"),
            None => "greedy.tokens".to_owned(),
        })
    }

    /// The prompt with the beginning of the reference's continuation, `length` tokens together.
    pub(crate) fn fed(&self, length: usize) -> Sequence {
        let ids = [self.reference.prompt().ids, self.greedy()].concat();
        Sequence { ids: ids[..length].to_vec(), positions: None }
    }

    /// The prompt with its positions spelt out, which keeps it out of the prefix cache.
    pub(crate) fn spelt_out(&self) -> Sequence {
        let prompt = self.reference.prompt();
        Sequence { positions: Some((0..prompt.ids.len() as u32).collect()), ..prompt }
    }

    /// Fails unless a run of `sequence`, which is one of those above or the prompt at uneven positions, gave what the
    /// reference gives.
    fn check(&self, what: &str, sequence: &Sequence, result: &Evaluation) {
        let vocab = result.logits.len() / sequence.ids.len();
        let prompt = self.reference.prompt().ids.len();
        let row = |logits: &[f32], rows: std::ops::Range<usize>| logits[rows.start * vocab..rows.end * vocab].to_vec();
        if *sequence == self.reference.gap_prompt() {
            if self.adapter.is_none() && self.dtype == DtypeChoice::Auto {
                let tolerance = self.engine.gap_tolerance(self.name);
                near(&format!("{what} gap"), &result.logits, &self.reference.floats("gap.logits"), tolerance);
            }
            self.check_alone(&format!("{what} gap"), &self.alone[1], result);
            return;
        }
        if sequence.ids == self.reference.prompt().ids {
            self.check_alone(what, &self.alone[0], result);
        }
        let (logits, tolerance) = match self.adapter {
            Some(name) => (format!("lora.{name}.logits"), F32),
            None if self.in_bf16() => ("logits".to_owned(), self.engine.tolerance(self.name)),
            None if is_bf16(self.name) => ("f32.logits".to_owned(), F32),
            None => ("logits".to_owned(), F32),
        };
        near(what, &row(&result.logits, 0..prompt), &self.reference.floats(&logits), tolerance);
        if self.dtype == DtypeChoice::Auto && self.adapter.is_none() {
            let trace = result.trace.rows(0..prompt, sequence.ids.len());
            assert_routes(self.engine, self.name, what, &trace, &self.reference);
            if !is_bf16(self.name) {
                let trace = result.trace.rows(0..prompt, sequence.ids.len());
                for (stage, rows) in &trace.activations {
                    near(&format!("{what} {stage}"), rows, &self.reference.floats(stage), F32);
                }
            }
        }
        // The rows of the reference's continuation, as far as it was fed.
        let fed = sequence.ids.len() - prompt + 1;
        let rows = row(&result.logits, prompt - 1..sequence.ids.len());
        if self.in_bf16() {
            let expected = row(&self.reference.floats("greedy.logits"), 0..fed.min(24));
            near_greedy_bf16(what, &row(&rows, 0..fed.min(24)), &expected);
        } else if !is_bf16(self.name) {
            // Where it was not, our own tokens must be the reference's.
            let left = &self.greedy()[fed - 1..];
            let compared = left.len().min(result.greedy_tokens.len());
            assert_eq!(result.greedy_tokens[..compared], left[..compared], "{what}: greedy tokens");
            if self.adapter.is_none() {
                let greedy = self.reference.floats("greedy.logits");
                near(&format!("{what} fed"), &rows, &row(&greedy, 0..fed), F32);
                let ours = row(&result.greedy_logits, 0..compared);
                near(&format!("{what} greedy"), &ours, &row(&greedy, fed - 1..fed - 1 + compared), F32);
            }
        }
    }

    /// Fails unless a run gave what the same sequence gave alone.
    fn check_alone(&self, what: &str, alone: &Evaluation, result: &Evaluation) {
        let compared = result.greedy_tokens.len().min(alone.greedy_tokens.len());
        assert_eq!(result.greedy_tokens[..compared], alone.greedy_tokens[..compared], "{what}: greedy tokens");
        // candle rounds keys and values that differ in the last bit to neighbours in bf16
        let tolerance = if self.in_bf16() { 5e-3 } else { F32 };
        near(&format!("{what} as alone"), &result.logits, &alone.logits, tolerance);
    }

    fn check_all(&self, what: &str, sequences: &[Sequence], results: &[Evaluation]) {
        assert_eq!(sequences.len(), results.len());
        for (index, (sequence, result)) in sequences.iter().zip(results).enumerate() {
            self.check(&format!("{what}, sequence {index}"), sequence, result);
        }
    }

    /// Prompts that are new, half fed, fed, and at uneven positions.
    fn batch(&self) -> Vec<Sequence> {
        vec![self.reference.prompt(), self.fed(31), self.reference.gap_prompt(), self.fed(42), self.spelt_out()]
    }
}

fn every(mode: &str, run: impl Fn(&Case, Engine, &str)) {
    for engine in Engine::all() {
        for case in Case::all(engine) {
            run(&case, engine, &case.what(engine, mode));
        }
    }
}

fn sum(results: &[Evaluation], figure: fn(&Evaluation) -> usize) -> usize {
    results.iter().map(figure).sum()
}

#[test]
fn alone_each_sequence_gives_the_reference_s_numbers() {
    every("alone", |case, engine, what| {
        let mut executor = case.load(engine, 8);
        let prompt = [case.reference.prompt()];
        let results = evaluate(&mut executor, &prompt, &case.settings(24)).expect("evaluated");
        assert_eq!(results[0].figures.steps, 24, "{what}: the prompt's step and one for each further token");
        case.check_all(what, &prompt, &results);
    });
}

#[test]
fn a_batch_gives_each_sequence_the_reference_s_numbers() {
    every("in a batch", |case, engine, what| {
        let (mut executor, batch) = (case.load(engine, 20), case.batch());
        let results = evaluate(&mut executor, &batch, &case.settings(24)).expect("evaluated");
        assert_eq!(sum(&results, |result| result.figures.preemptions), 0, "{what}");
        assert!(results.iter().all(|result| result.figures.steps == 24), "{what}: all run side by side");
        case.check_all(what, &batch, &results);
    });
}

#[test]
fn chunks_beside_decoding_sequences_give_the_reference_s_numbers() {
    every("in chunks", |case, engine, what| {
        let (mut executor, batch) = (case.load(engine, 20), case.batch());
        for (chunk, step_tokens) in [(1, 64), (5, 64), (usize::MAX, 11)] {
            let settings = Settings { chunk, step_tokens, ..case.settings(6) };
            let results = evaluate(&mut executor, &batch, &settings).expect("evaluated");
            assert!(sum(&results, |result| result.figures.steps) > 5 * 6 + 10, "{what}: {chunk}, {step_tokens}");
            case.check_all(&format!("{what} of {chunk}, {step_tokens}"), &batch, &results);
        }
    });
}

#[test]
fn preempted_sequences_are_computed_again_to_the_reference_s_numbers() {
    every("preempted", |case, engine, what| {
        // The first sequence of a pair needs its third block when the second one has the last of the pool.
        let batch = [case.fed(31), case.spelt_out(), case.fed(31), case.reference.gap_prompt()];
        let mut executor = case.load(engine, 4);
        let results = evaluate(&mut executor, &batch, &case.settings(40)).expect("evaluated");
        for victim in [&results[1], &results[3]] {
            assert!(victim.figures.preemptions >= 1, "{what}: {:?}", victim.figures);
            assert!(victim.figures.recomputed_tokens > 32, "{what}: {:?}", victim.figures);
        }
        assert_eq!(results[0].figures.preemptions, 0, "{what}: the first in line gives way to nobody");
        case.check_all(what, &batch, &results);

        let settings = Settings { rows: Rows::Last, chunk: 5, ..case.settings(40) };
        let last = evaluate(&mut executor, &batch, &settings).expect("evaluated");
        assert!(sum(&last, |result| result.figures.preemptions) > 0, "{what}, in chunks");
        for (all, last) in results.iter().zip(&last) {
            let row = &all.logits[all.logits.len() - last.logits.len()..];
            assert_eq!((last.logits.len(), last.trace.count), (320, all.trace.count), "{what}, in chunks");
            near(&format!("{what}, last row"), &last.logits, row, engine.tolerance(case.name));
        }
    });
}

#[test]
fn a_beginning_found_in_the_prefix_cache_goes_on_to_the_reference_s_numbers() {
    every("behind a found prefix", |case, engine, what| {
        let batch = [case.fed(42), case.reference.prompt(), case.fed(40), case.spelt_out()];
        let mut executor = case.load(engine, 20);
        let first = evaluate(&mut executor, &batch, &case.settings(20)).expect("evaluated");
        assert_eq!(sum(&first, |result| result.figures.prefix_hit_tokens), 0, "{what}: nothing to find yet");
        for (repeat, chunk) in [(2, usize::MAX), (3, 4)] {
            let settings = Settings { repeat, chunk, ..case.settings(20) };
            let results = evaluate(&mut executor, &batch, &settings).expect("evaluated");
            let hits: Vec<usize> = results.iter().map(|result| result.figures.prefix_hit_tokens).collect();
            assert_eq!(hits, [32, 0, 32, 0], "{what}");
            case.check_all(what, &batch, &results);
        }
    });
}
