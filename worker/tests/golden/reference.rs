//! Golden folders, and what is compared with them.

use std::io::Write;
use std::path::{Path, PathBuf};

use ernie_kernels::Level;
use ernie_worker::eval::evaluate::{Evaluation, Sequence, Settings, evaluate};
use ernie_worker::executor::BLOCK_TOKENS;
use ernie_worker::model::trace::Trace;
use ernie_worker::model::{self, BackendChoice, Checkpoint, DtypeChoice, KvSize, LoadOptions, ModelExecutor};
use safetensors::SafeTensors;

/// Every dense folder.
pub(crate) const DENSE: [&str; 7] =
    ["dense-tied", "dense-untied", "dense-mha", "dense-bias", "dense-oldname", "dense-bf16", "dense-lora"];
/// Every folder with experts.
pub(crate) const MOE: [&str; 3] = ["moe-shared", "moe-noshared", "moe-bf16"];
/// Tolerance of f32 logits.
pub(crate) const F32: f32 = 5e-4;

/// Whether a folder's weights are bf16.
pub(crate) fn is_bf16(name: &str) -> bool {
    name.ends_with("bf16")
}

/// An adapter of `dense-lora`, as it is given to a worker.
pub(crate) fn adapter(name: &str) -> (String, PathBuf) {
    (name.to_owned(), folder("dense-lora").join(name))
}

/// Where a golden folder lies.
pub(crate) fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// The reference's numbers of one folder.
pub(crate) struct Reference(Vec<u8>);

impl Reference {
    /// Reads a folder's numbers.
    pub(crate) fn of(name: &str) -> Self {
        Self(std::fs::read(folder(name).join("golden.safetensors")).expect("golden.safetensors"))
    }

    fn file(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.0).expect("a safetensors file")
    }

    /// A tensor of floats.
    pub(crate) fn floats(&self, name: &str) -> Vec<f32> {
        let file = self.file();
        let tensor = file.tensor(name).unwrap_or_else(|_| panic!("no {name}"));
        tensor.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    /// A tensor of whole numbers.
    pub(crate) fn numbers(&self, name: &str) -> Vec<u32> {
        let file = self.file();
        let tensor = file.tensor(name).unwrap_or_else(|_| panic!("no {name}"));
        tensor.data().as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes) as u32).collect()
    }

    /// The names of all tensors.
    pub(crate) fn names(&self) -> Vec<String> {
        self.file().names().into_iter().map(str::to_owned).collect()
    }

    /// The prompt.
    pub(crate) fn prompt(&self) -> Sequence {
        Sequence { ids: self.numbers("input_ids"), positions: None }
    }

    /// The prompt at uneven positions.
    pub(crate) fn gap_prompt(&self) -> Sequence {
        Sequence { positions: Some(self.numbers("gap.position_ids")), ..self.prompt() }
    }
}

/// What computes, at which level.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Engine(pub(crate) BackendChoice, pub(crate) Option<Level>);

impl Engine {
    /// candle, and the kernels at every level that this CPU has.
    pub(crate) fn all() -> Vec<Engine> {
        static TOLD: std::sync::Once = std::sync::Once::new();
        TOLD.call_once(|| {
            for level in Level::ALL.into_iter().filter(|level| !level.is_available()) {
                // straight to the terminal: what a passing test prints is not shown
                let _ =
                    writeln!(std::io::stderr(), "SKIPPED: the golden tests at {level}, which this CPU does not have");
            }
        });
        let kernels = Level::available().map(|level| Engine(BackendChoice::Cpu, Some(level)));
        std::iter::once(Engine(BackendChoice::Candle, None)).chain(kernels).collect()
    }

    /// The kernels at the best level.
    pub(crate) fn best() -> Engine {
        Engine(BackendChoice::Cpu, None)
    }

    /// The tolerance of a folder in its own number format.
    pub(crate) fn tolerance(self, name: &str) -> f32 {
        match name {
            "dense-bf16" => 0.25 * self.slack(),
            "moe-bf16" => 0.6 * self.slack(),
            _ => F32,
        }
    }

    /// The same at uneven positions. A restatement of the reference that rounds to bf16 where it rounds gives its numbers
    /// within 1e-3; exact arithmetic on the same weights is 0.403 away from them here, 0.229 in the plain prompt.
    pub(crate) fn gap_tolerance(self, name: &str) -> f32 {
        if name == "dense-bf16" { 0.45 * self.slack() } else { self.tolerance(name) }
    }

    /// Whether activations are rounded to bf16 beside weights of that format.
    pub(crate) fn rounds(self) -> bool {
        self.0 == BackendChoice::Cpu && self.1.unwrap_or_else(Level::best) == Level::Amx
    }

    /// Tolerances are for exact arithmetic, as far as that is from the reference's roundings. What rounds as often, but
    /// elsewhere, is as far from exact arithmetic: independent errors of one size are about √2 times that apart.
    fn slack(self) -> f32 {
        if self.rounds() { 1.5 } else { 1.0 }
    }

    /// Loads a folder with a cache of a few hundred tokens.
    pub(crate) fn load(self, path: &Path, dtype: DtypeChoice, adapters: &[(String, PathBuf)]) -> ModelExecutor {
        self.load_with(path, |options| {
            options.dtype = dtype;
            options.adapters = adapters.to_vec();
        })
    }

    /// The same with other options.
    pub(crate) fn load_with(self, path: &Path, change: impl FnOnce(&mut LoadOptions)) -> ModelExecutor {
        let checkpoint = Checkpoint::inspect(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut options = LoadOptions {
            backend: self.0,
            level: self.1,
            threads: 2,
            kv: KvSize::Blocks(2048 / BLOCK_TOKENS),
            max_model_len: Some(1024),
            ..LoadOptions::default()
        };
        change(&mut options);
        model::load(&checkpoint, &options, &|_| {}).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// Loads a golden folder in its own number format and runs one sequence.
    pub(crate) fn run(self, name: &str, sequence: &Sequence, settings: &Settings) -> Evaluation {
        let mut executor = self.load(&folder(name), DtypeChoice::Auto, &[]);
        single(&mut executor, sequence, settings)
    }
}

/// Runs one sequence.
pub(crate) fn single(executor: &mut ModelExecutor, sequence: &Sequence, settings: &Settings) -> Evaluation {
    evaluate(executor, std::slice::from_ref(sequence), settings).expect("evaluated").remove(0)
}

/// The largest absolute difference.
pub(crate) fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "numbers to compare");
    assert!(a.iter().all(|value| value.is_finite()), "finite numbers");
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Fails when numbers are further apart than a tolerance; prints how far they are.
pub(crate) fn near(what: &str, a: &[f32], b: &[f32], tolerance: f32) {
    let distance = distance(a, b);
    println!("{what}: {distance:.2e} of {tolerance:.0e}");
    assert!(distance <= tolerance, "{what}: {distance} apart, at most {tolerance} allowed");
}

/// Fails unless the routers chose the reference's experts for its prompt, with its shares.
pub(crate) fn assert_routes(engine: Engine, name: &str, what: &str, trace: &Trace, reference: &Reference) {
    let layers = reference.names().iter().filter(|name| name.ends_with(".index")).count();
    assert_eq!(trace.routers.len(), layers, "{what}: layers with experts");
    let (scores, shares) = if is_bf16(name) { (0.25 * engine.slack(), 0.02 * engine.slack()) } else { (F32, 1e-4) };
    for router in &trace.routers {
        let layer = format!("router.{}", router.layer);
        let logits = reference.floats(&format!("{layer}.logits"));
        near(&format!("{what} {layer}"), &router.logits, &logits, scores);
        let index = reference.numbers(&format!("{layer}.index"));
        let weight = reference.floats(&format!("{layer}.weight"));
        let active = router.routes.active;
        for row in 0..trace.count {
            // as sets: equal scores may come in either order
            let pairs = |index: &[u32], weight: &[f32]| {
                let places = row * active..(row + 1) * active;
                let mut pairs: Vec<(u32, f32)> = places.map(|place| (index[place], weight[place])).collect();
                pairs.sort_by_key(|pair| pair.0);
                pairs
            };
            let ours = pairs(&router.routes.index, &router.routes.weight);
            for ((expert, share), (expected, expected_share)) in ours.into_iter().zip(pairs(&index, &weight)) {
                assert_eq!(expert, expected, "{what} {layer} row {row}");
                let apart = (share - expected_share).abs();
                assert!(apart <= shares, "{what} {layer} row {row}: {apart} apart, at most {shares} allowed");
            }
        }
    }
}

/// Fails unless rows computed behind the reference's own bf16 tokens are near its rows, and our choice is one that the
/// reference holds nearly as good as its best.
pub(crate) fn near_greedy_bf16(what: &str, rows: &[f32], expected: &[f32]) {
    const VOCAB: usize = 320;
    near(what, rows, expected, 0.7);
    for (ours, theirs) in rows.chunks(VOCAB).zip(expected.chunks(VOCAB)) {
        let best = |row: &[f32]| row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let choice = ours.iter().position(|&logit| logit == best(ours)).expect("a largest");
        assert!(theirs[choice] >= best(theirs) - 0.5, "{what}");
    }
}
