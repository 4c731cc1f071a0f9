//! What the engine reads off prompts, log-probabilities and pooled hidden states, against the logits and hidden states that
//! `eval` gives for them alone: the same bits on our kernels, in every way that the scheduler can run a prompt.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ernie_worker::engine::{
    Adapter, Engine, EngineConfig, EngineHandle, Event, EventStream, Observer, Pooling, PromptOutput, RejectionKind,
    Request, RequestReport, StepReport,
};
use ernie_worker::eval::evaluate::{Evaluation, Sequence};
use ernie_worker::model::BackendChoice;
use ernie_worker::sampling::{SamplingParams, Scratch, TokenLogprobs, score};

use crate::modes::Case;
use crate::reference::{Engine as Computing, F32, is_bf16, near, single};

/// Counts what the engine did.
#[derive(Default)]
struct Happened(std::sync::Mutex<StepReport>);

impl Observer for Happened {
    fn step(&self, report: &StepReport) {
        let mut sum = self.0.lock().expect("nobody panics");
        sum.preemptions += report.preemptions;
        sum.prefix_hits += report.prefix_hits;
    }
    fn first_token(&self, _: Duration) {}
    fn token(&self, _: Duration) {}
    fn ended(&self, _: &RequestReport<'_>) {}
    fn rejected(&self, _: RejectionKind) {}
}

/// A prompt, what is asked of it, and how many tokens follow.
type Asked<'a> = (&'a Sequence, PromptOutput, u32);

/// What a prompt gave, as numbers: log-probabilities with the best tokens', or the embedding.
async fn numbers(mut stream: EventStream) -> Vec<f32> {
    let mut numbers = Vec::new();
    while let Some(event) = stream.next().await {
        match event {
            Event::PromptLogprobs(some) => some.iter().for_each(|one| add(&mut numbers, &one.logprobs)),
            Event::Embedding(embedding) => numbers.extend(embedding),
            Event::Started(_) | Event::Token(_) | Event::Finished(_) => {}
            Event::Failed(failure) => panic!("{failure}"),
        }
    }
    numbers
}

fn add(numbers: &mut Vec<f32>, logprobs: &TokenLogprobs) {
    numbers.push(logprobs.chosen);
    numbers.extend(logprobs.top.iter().flat_map(|&(id, logprob)| [id as f32, logprob]));
}

/// The same from what `eval` gave for the sequence.
fn expected(evaluation: &Evaluation, ids: &[u32], output: PromptOutput) -> Vec<f32> {
    let mut numbers = Vec::new();
    match output {
        PromptOutput::Logprobs { first, top } => {
            let vocab = evaluation.logits.len() / ids.len();
            for (row, &id) in evaluation.logits.chunks_exact(vocab).zip(&ids[1..]).skip(first - 1) {
                add(&mut numbers, &score(row, id, top as usize, &mut Scratch::default()).into());
            }
        }
        PromptOutput::Embedding(pooling) => {
            let (_, norm) =
                evaluation.trace.activations.iter().find(|(name, _)| name == "norm").expect("the last norm");
            numbers = pooled(norm, ids.len(), pooling);
        }
    }
    numbers
}

fn pooled(norm: &[f32], rows: usize, pooling: Pooling) -> Vec<f32> {
    let width = norm.len() / rows;
    let first = if pooling == Pooling::Last { rows - 1 } else { 0 };
    let mut sum = vec![0f64; width];
    for row in norm.chunks_exact(width).skip(first) {
        sum.iter_mut().zip(row).for_each(|(sum, &value)| *sum += f64::from(value));
    }
    sum.into_iter().map(|sum| (sum / (rows - first) as f64) as f32).collect()
}

fn request(case: &Case, index: usize, (sequence, output, max_tokens): Asked<'_>) -> Request {
    Request {
        id: index.to_string(),
        position_ids: sequence.positions.clone(),
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        prompt_output: Some(output),
        max_tokens: Some(max_tokens),
        ignore_eos: true,
        adapter: case.adapter.map(|_| Adapter { index: 0, digest: [1; 32] }),
        ..Request::new(sequence.ids.clone(), Instant::now() + Duration::from_secs(600))
    }
}

fn start(case: &Case, computing: Computing, blocks: usize, tokens: usize) -> (EngineHandle, Arc<Happened>) {
    let executor = case.load(computing, blocks);
    let config = EngineConfig {
        max_num_seqs: 8,
        max_num_batched_tokens: tokens,
        warm_up: Duration::ZERO,
        ..EngineConfig::default()
    };
    let happened = Arc::new(Happened::default());
    (Engine::start(executor, config, Arc::clone(&happened) as Arc<dyn Observer>).expect("starts"), happened)
}

#[tokio::test]
async fn prompts_give_the_numbers_of_eval_in_every_mode() {
    // In each case it depends on who came first.
    let mut preemptions = 0;
    for computing in Computing::all() {
        for case in Case::all(computing) {
            let exact = computing.0 == BackendChoice::Cpu;
            if !exact && is_bf16(case.name) {
                // candle rounds to bf16 in an order that depends on the batch.
                continue;
            }
            let sequences = [case.fed(42), case.fed(31), case.spelt_out(), case.reference.prompt()];
            let mut executor = case.load(computing, 8);
            let alone = |sequence| single(&mut executor, sequence, &case.settings(0));
            let evaluations: Vec<Evaluation> = sequences.iter().map(alone).collect();
            // With few blocks the first two get in each other's way at the end of their second block.
            let asked: Vec<(usize, PromptOutput, u32)> = vec![
                (1, PromptOutput::Logprobs { first: 1, top: 0 }, 60),
                (2, PromptOutput::Logprobs { first: 2, top: 20 }, 60),
                (0, PromptOutput::Logprobs { first: 1, top: 3 }, 0),
                (0, PromptOutput::Embedding(Pooling::Mean), 0),
                (0, PromptOutput::Logprobs { first: 36, top: 1 }, 0),
                (1, PromptOutput::Embedding(Pooling::Last), 0),
                (3, PromptOutput::Embedding(Pooling::Mean), 20),
                (0, PromptOutput::Embedding(Pooling::Last), 0),
            ];
            for (mode, blocks, tokens, rounds) in
                [("with room", 40, 512, 2), ("in pieces", 40, 9, 1), ("preempted", 4, 64, 1)]
            {
                let (engine, happened) = start(&case, computing, blocks, tokens);
                for _ in 0..rounds {
                    let submit = |(index, &(sequence, output, tokens)): (usize, &(usize, PromptOutput, u32))| {
                        engine.submit(request(&case, index, (&sequences[sequence], output, tokens))).expect("taken")
                    };
                    let streams: Vec<_> = asked.iter().enumerate().map(submit).collect();
                    for (&(sequence, output, _), stream) in asked.iter().zip(streams) {
                        let what = case.what(computing, mode);
                        let expected = expected(&evaluations[sequence], &sequences[sequence].ids, output);
                        let given = numbers(stream).await;
                        if exact {
                            let bits = |numbers: &[f32]| numbers.iter().map(|n| n.to_bits()).collect::<Vec<_>>();
                            assert!(bits(&given) == bits(&expected), "{what}: {output:?} of {sequence} has other bits");
                        } else {
                            near(&what, &given, &expected, 1e-4);
                        }
                    }
                }
                let happened = *happened.0.lock().expect("nobody panics");
                preemptions += happened.preemptions;
                assert!(mode != "with room" || happened.prefix_hits > 0, "{}", case.what(computing, mode));
            }
        }
    }
    assert!(preemptions > 10, "{preemptions}");
}

#[tokio::test]
async fn embeddings_are_the_reference_s_hidden_states_pooled() {
    for computing in Computing::all() {
        for case in Case::all(computing).into_iter().filter(|case| case.adapter.is_none() && !is_bf16(case.name)) {
            let prompt = case.reference.prompt();
            let (engine, _) = start(&case, computing, 8, 64);
            for pooling in [Pooling::Last, Pooling::Mean] {
                let asked = (&prompt, PromptOutput::Embedding(pooling), 0);
                let given = numbers(engine.submit(request(&case, 0, asked)).expect("taken")).await;
                let expected = pooled(&case.reference.floats("norm"), prompt.ids.len(), pooling);
                near(&case.what(computing, &format!("{pooling:?}")), &given, &expected, F32);
            }
        }
    }
}
