//! An executor without a model. The logits of a row are a hash of all tokens that the row sees through its block table,
//! with their positions and adapters; so a block that is lost, shared wrongly or written by another sequence changes
//! the tokens that follow.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use crate::executor::{
    BLOCK_TOKENS, ExecuteError, Executor, Geometry, LogitRows, Reading, Readout, SequenceStep, StepOutput, StepPlan,
};
use crate::sampling::{Scratch, score};

pub(super) const VOCAB: usize = 50;

/// What a test does to the executor.
#[derive(Default)]
pub(super) struct Controls {
    held: Mutex<Held>,
    released: Condvar,
    /// Steps run so far.
    pub(super) steps: AtomicUsize,
    /// What happens in the next step that it concerns.
    pub(super) next: Mutex<Option<Accident>>,
    /// Time that a step takes at least.
    pub(super) delay: Mutex<Duration>,
}

#[derive(Default)]
struct Held {
    hold: bool,
    waiting: bool,
}

/// Something that goes wrong.
#[derive(Clone, Copy, Debug)]
pub(super) enum Accident {
    Error,
    Panic,
    /// Logits of a wrong shape.
    Shape,
    /// Logits that are not numbers, for sequences whose newest token is this one.
    NotANumber(u32),
}

impl Accident {
    fn concerns(self, plan: &StepPlan) -> bool {
        match self {
            Self::Error | Self::Panic | Self::Shape => true,
            Self::NotANumber(token) => plan.sequences.iter().any(|part| part.tokens.last() == Some(&token)),
        }
    }
}

impl Controls {
    /// The next step waits until [`release`](Self::release).
    pub(super) fn hold(&self) {
        self.held.lock().unwrap().hold = true;
    }

    pub(super) fn release(&self) {
        self.held.lock().unwrap().hold = false;
        self.released.notify_all();
    }

    /// Whether a step waits.
    pub(super) fn is_held(&self) -> bool {
        self.held.lock().unwrap().waiting
    }

    fn pass(&self) {
        let mut held = self.held.lock().unwrap();
        while held.hold {
            held.waiting = true;
            held = self.released.wait(held).unwrap();
        }
        held.waiting = false;
    }
}

pub(super) struct HashExecutor {
    geometry: Geometry,
    controls: Arc<Controls>,
    /// For each place: what was written there.
    cache: Vec<[u64; BLOCK_TOKENS]>,
}

impl HashExecutor {
    pub(super) fn new(blocks: usize, max_model_len: usize, controls: Arc<Controls>) -> Self {
        let geometry = Geometry { vocab: VOCAB, hidden: VOCAB, blocks, max_model_len };
        Self { geometry, controls, cache: vec![[0; BLOCK_TOKENS]; blocks] }
    }

    fn cell(&mut self, part: &SequenceStep, place: usize) -> &mut u64 {
        &mut self.cache[part.blocks[place / BLOCK_TOKENS] as usize][place % BLOCK_TOKENS]
    }
}

impl Executor for HashExecutor {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn execute(&mut self, plan: &StepPlan) -> Result<StepOutput, ExecuteError> {
        self.controls.pass();
        self.controls.steps.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(*self.controls.delay.lock().unwrap());
        let accident = self.controls.next.lock().unwrap().take_if(|accident| accident.concerns(plan));
        match accident {
            Some(Accident::Error) => return Err(ExecuteError::Failed("/secret/path: out of luck".to_owned())),
            Some(Accident::Panic) => panic!("a kernel met a ghost"),
            _ => {}
        }
        for part in &plan.sequences {
            let start = part.start as usize;
            for (row, &token) in part.tokens.iter().enumerate() {
                let position = part.position_ids.as_ref().map_or((start + row) as u32, |ids| ids[row]);
                *self.cell(part, start + row) = cell(token, position, part.adapter);
            }
        }
        let mut logits = vec![];
        for part in &plan.sequences {
            let end = part.start as usize + part.tokens.len();
            let mut row = match part.logits {
                LogitRows::None => vec![],
                LogitRows::Last => row((0..end).map(|place| *self.cell(part, place))),
                LogitRows::All => return Err(ExecuteError::InvalidPlan("no caller asks for every row".to_owned())),
            };
            match accident {
                Some(Accident::NotANumber(token)) if part.tokens.last() == Some(&token) => row.fill(f32::NAN),
                Some(Accident::Shape) => row.push(0.0),
                _ => {}
            }
            logits.push(row);
        }
        let readings = plan.sequences.iter().filter(|part| part.reading.is_some());
        let mut readings: Vec<_> = readings.map(|part| self.read(part)).collect();
        if let Some(Accident::NotANumber(_)) = accident
            && let Some(Readout::Scores(scores)) = readings.first_mut()
        {
            scores[0].log_sum_exp = f32::NAN;
        }
        Ok(StepOutput { logits, readings })
    }
}

impl HashExecutor {
    /// Of a row that is read, the hidden state is what its logits are.
    fn read(&mut self, part: &SequenceStep) -> Readout {
        let reading = part.reading.as_ref().unwrap();
        let mut rows = reading.rows().map(|place| {
            let end = part.start as usize + place + 1;
            row((0..end).map(|place| *self.cell(part, place)))
        });
        match reading {
            Reading::Scores { targets, top, .. } => {
                let score = |(row, &target): (Vec<f32>, _)| score(&row, target, *top as usize, &mut Scratch::default());
                Readout::Scores(rows.by_ref().zip(targets).map(score).collect())
            }
            Reading::HiddenSum { onto, .. } => {
                let onto = if onto.is_empty() { vec![0.0; VOCAB] } else { onto.clone() };
                let add = |sum: Vec<f64>, row: Vec<f32>| sum.iter().zip(row).map(|(a, b)| a + f64::from(b)).collect();
                Readout::HiddenSum(rows.fold(onto, add))
            }
        }
    }
}

/// What a token leaves in the cache.
pub(super) fn cell(token: u32, position: u32, adapter: Option<u32>) -> u64 {
    mix(u64::from(token) << 32 | u64::from(position)) ^ mix(u64::from(adapter.map_or(u32::MAX, |adapter| adapter)))
}

/// The logits of a row that sees these cells.
pub(super) fn row(cells: impl Iterator<Item = u64>) -> Vec<f32> {
    let digest = cells.fold(0, |digest: u64, cell| mix(digest.rotate_left(7) ^ cell));
    (0..VOCAB as u64).map(|token| (mix(digest ^ token) >> 40) as f32 / (1 << 21) as f32).collect()
}

fn mix(bits: u64) -> u64 {
    let bits = (bits ^ (bits >> 30)).wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}
