//! What constrained decoding costs: the time that a mask takes at ERNIE's vocabulary of 103,424, and what running streams
//! feel of it.
//!
//! `cargo bench --workspace --bench constraint`. Masks: answers to realistic schemas, token by token; the aim is a p99 of a
//! millisecond. Streams: random weights in the shape of ERNIE-4.5-0.3B, of which half are constrained and free in turn; the aim
//! is an inter-token latency that is at most a tenth longer, of those and of the others. `… -- masks`, `… -- streams` and
//! `… -- memory`, what answers take while they are written, measure one of them alone.

#![allow(clippy::unwrap_used, reason = "a bench that cannot go on has failed")]

#[path = "constraint/answers.rs"]
mod answers;
#[path = "constraint/streams.rs"]
mod streams;
#[path = "constraint/vocabulary.rs"]
mod vocabulary;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ernie_worker::bench::figures::Percentiles;
use ernie_worker::constraint::{Constraint, Grammars, Observer};
use ernie_worker::engine::{Guide, Next};
use ernie_worker::tokenizer::Tokenizer;

use vocabulary::{END, VOCAB};

/// Keeps every time.
#[derive(Default)]
struct Times {
    compiled: Mutex<Vec<f64>>,
    masked: Mutex<Vec<f64>>,
}

impl Observer for Times {
    fn compiled(&self, took: Duration) {
        self.compiled.lock().unwrap().push(took.as_secs_f64());
    }

    fn masked(&self, took: Duration) {
        self.masked.lock().unwrap().push(took.as_secs_f64());
    }

    fn waited(&self, _: Duration) {}
}

/// Writes a text under a constraint, with the longest token that is allowed at each place. Gives the guide behind it.
fn write(
    grammars: &Grammars,
    tokenizer: &Tokenizer,
    ids: &vocabulary::Ids,
    constraint: &Constraint,
    text: &str,
) -> Box<dyn Guide> {
    let grammar = grammars.compile(constraint).unwrap();
    let mut guide = grammar.start(false, &[]).unwrap();
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        let Next::Within(mask) = guide.next().unwrap() else { panic!("over before {rest:?}") };
        let id =
            ids.longest(rest, |id| mask.allows(id)).unwrap_or_else(|| panic!("{constraint:?}: {text:?} at {rest:?}"));
        rest = &rest[tokenizer.bytes(id).len()..];
        guide.advance(id);
    }
    guide.next().unwrap();
    guide
}

/// Answers of which the memory is measured.
const ALIVE: usize = 64;

/// Prints what each answer takes once it is written, beside the grammar that all of them share.
fn memory() {
    let tokenizer = Arc::new(vocabulary::tokenizer());
    let ids = vocabulary::Ids::new(&tokenizer);
    let grammars = Grammars::new(Arc::clone(&tokenizer), VOCAB, [END].into(), Arc::new(()));
    let mut alive = Vec::new();
    for (name, constraint, texts) in answers::all() {
        let mut more = || alive.extend((0..ALIVE).map(|_| write(&grammars, &tokenizer, &ids, &constraint, &texts[0])));
        // The first fill what compiling left free, and so none is dropped.
        more();
        let before = resident();
        more();
        println!("memory, {name:22} {:5} KiB an answer", (resident().saturating_sub(before) / ALIVE as u64) >> 10);
    }
}

fn masks() {
    let tokenizer = Arc::new(vocabulary::tokenizer());
    let ids = vocabulary::Ids::new(&tokenizer);
    let times = Arc::new(Times::default());
    let before = resident();
    let begun = Instant::now();
    let grammars = Grammars::new(Arc::clone(&tokenizer), VOCAB, [END].into(), times.clone());
    grammars.compile(&Constraint::Regex("a".to_owned())).unwrap();
    println!(
        "first grammar: {:.2} s, {} MiB for the vocabulary's trie",
        begun.elapsed().as_secs_f64(),
        (resident() - before) >> 20
    );
    times.compiled.lock().unwrap().clear();
    for (name, constraint, texts) in answers::all() {
        times.masked.lock().unwrap().clear();
        for text in &texts {
            drop(write(&grammars, &tokenizer, &ids, &constraint, text));
        }
        report(name, &times.masked.lock().unwrap());
    }
    times.masked.lock().unwrap().clear();
    for (_, constraint, texts) in answers::all() {
        texts.iter().for_each(|text| drop(write(&grammars, &tokenizer, &ids, &constraint, text)));
    }
    report("all", &times.masked.lock().unwrap());
    let compiled = times.compiled.lock().unwrap().clone();
    println!("compiling: {:.1} ms at most", compiled.iter().copied().fold(0.0, f64::max) * 1e3);
}

fn report(name: &str, times: &[f64]) {
    let longest = times.iter().copied().fold(0.0, f64::max);
    let Percentiles { p50, p99, .. } = Percentiles::of(times.to_vec()).unwrap();
    let micros = |seconds: f64| seconds * 1e6;
    println!(
        "masks, {name:22} {:6} tokens: p50 {:6.0} µs, p99 {:6.0} µs, longest {:6.0} µs",
        times.len(),
        micros(p50),
        micros(p99),
        micros(longest)
    );
}

/// Bytes of this process in memory.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if !arguments.iter().any(|argument| argument == "--bench") {
        // `cargo test --benches` asks for no figures
        return;
    }
    const PARTS: [(&str, fn()); 3] = [("memory", memory), ("masks", masks), ("streams", streams::measure)];
    let asked = |part: &str| arguments.iter().any(|argument| argument == part);
    let all = !PARTS.iter().any(|(part, _)| asked(part));
    PARTS.iter().filter(|(part, _)| all || asked(part)).for_each(|(_, measure)| measure());
}
