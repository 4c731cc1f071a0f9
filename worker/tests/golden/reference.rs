//! Golden folders, and what is compared with them.

use std::path::{Path, PathBuf};

use ernie_kernels::Level;
use ernie_worker::eval::evaluate::{Evaluation, Sequence, Settings, evaluate};
use ernie_worker::executor::BLOCK_TOKENS;
use ernie_worker::model::{self, BackendChoice, Checkpoint, DtypeChoice, KvSize, LoadOptions, ModelExecutor};
use safetensors::SafeTensors;

/// Every dense folder.
pub(crate) const DENSE: [&str; 7] =
    ["dense-tied", "dense-untied", "dense-mha", "dense-bias", "dense-oldname", "dense-bf16", "dense-lora"];
/// Every folder with experts.
pub(crate) const MOE: [&str; 3] = ["moe-shared", "moe-noshared", "moe-bf16"];
/// Tolerance of f32 logits.
pub(crate) const F32: f32 = 5e-4;

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
        let kernels = Level::available().map(|level| Engine(BackendChoice::Cpu, Some(level)));
        std::iter::once(Engine(BackendChoice::Candle, None)).chain(kernels).collect()
    }

    /// The kernels at the best level.
    pub(crate) fn best() -> Engine {
        Engine(BackendChoice::Cpu, None)
    }

    /// Loads a folder with a cache of a few hundred tokens.
    pub(crate) fn load(self, path: &Path, dtype: DtypeChoice, adapters: &[(String, PathBuf)]) -> ModelExecutor {
        let checkpoint = Checkpoint::inspect(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let options = LoadOptions {
            dtype,
            backend: self.0,
            level: self.1,
            threads: 2,
            kv: KvSize::Blocks(2048 / BLOCK_TOKENS),
            max_model_len: Some(1024),
            adapters: adapters.to_vec(),
            ..LoadOptions::default()
        };
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
