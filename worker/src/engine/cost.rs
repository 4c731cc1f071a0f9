//! PURE: what a step costs, learnt from the steps themselves.
//!
//! `seconds = base + per_token * tokens + per_sequence * sequences + per_context * context`, fitted by least squares on
//! relative errors. Old steps fade, but steps that only decode never wash out what was learnt from steps that read
//! prompts: each kind fades at its own pace.

/// Size of a step, as far as it determines the cost.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Shape {
    /// Rows of the flat batch.
    pub tokens: usize,
    /// Rows that go through the output head: sampled from, or scored.
    pub sequences: usize,
    /// Pairs of a row and a cached token that it attends to.
    pub context: usize,
    /// Whether some sequence runs more than the one row that it samples from.
    pub reads_prompts: bool,
}

impl Shape {
    /// The part of a sequence that runs `rows` tokens from `start` on. `samples`: its last row gets logits. `scored`: so do
    /// so many others.
    pub fn of_rows(start: usize, rows: usize, samples: bool, scored: usize) -> Self {
        let context = rows * start + rows * (rows + 1) / 2;
        let sampled = usize::from(samples);
        Self { tokens: rows, sequences: sampled + scored, context, reads_prompts: rows > sampled }
    }

    /// Both in one step.
    pub fn plus(self, other: Self) -> Self {
        Self {
            tokens: self.tokens + other.tokens,
            sequences: self.sequences + other.sequences,
            context: self.context + other.context,
            reads_prompts: self.reads_prompts || other.reads_prompts,
        }
    }

    /// Scaled so that all features of usual steps are of similar size, which keeps the equations well conditioned.
    fn features(self) -> [f64; TERMS] {
        [1.0, self.tokens as f64 / SCALE[1], self.sequences as f64 / SCALE[2], self.context as f64 / SCALE[3]]
    }
}

const TERMS: usize = 4;
const SCALE: [f64; TERMS] = [1.0, 64.0, 16.0, 65_536.0];

/// Seconds that a step takes. All zero while nothing is known.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepCost {
    /// Seconds of any step.
    pub base: f64,
    /// Seconds for each token.
    pub per_token: f64,
    /// Seconds for each row of logits.
    pub per_sequence: f64,
    /// Seconds for each pair of a row and a cached token.
    pub per_context: f64,
}

impl StepCost {
    /// Expected duration of a step.
    pub fn seconds(&self, shape: Shape) -> f64 {
        self.base
            + self.per_token * shape.tokens as f64
            + self.per_sequence * shape.sequences as f64
            + self.per_context * shape.context as f64
    }

    /// The terms by name, in seconds.
    pub fn terms(&self) -> [(&'static str, f64); TERMS] {
        let Self { base, per_token, per_sequence, per_context } = *self;
        [("base", base), ("token", per_token), ("sequence", per_sequence), ("context", per_context)]
    }

    /// The most rows, from `start` on, that a step may still take beside `shape` and last no longer than `target`
    /// seconds; `None` while nothing is known. `scored`: each of them goes through the output head.
    pub fn rows_within(&self, shape: Shape, start: usize, scored: bool, target: f64) -> Option<usize> {
        if *self == Self::default() {
            return None;
        }
        // per_context / 2 * n^2 + (per_token + per_context * start) * n = spare, and a row of logits each where scored
        let spare = target - self.seconds(shape) - self.per_sequence;
        if spare <= 0.0 {
            return Some(0);
        }
        let per_score = if scored { self.per_sequence } else { 0.0 };
        let (a, b) = (self.per_context / 2.0, self.per_token + per_score + self.per_context * start as f64);
        // In this form nothing cancels when `a` is small.
        let rows = 2.0 * spare / (b + (b * b + 4.0 * a * spare).sqrt());
        // Infinite when neither tokens nor context cost anything; the cast saturates.
        Some(rows as usize)
    }
}

/// Learns a [`StepCost`].
#[derive(Clone, Debug, Default)]
pub struct CostModel {
    decoding: Evidence,
    reading: Evidence,
    cost: StepCost,
    seen: u32,
}

/// Steps of one kind, summed up with fading weights: the normal equations of least squares.
#[derive(Clone, Debug, Default)]
struct Evidence {
    matrix: [[f64; TERMS]; TERMS],
    vector: [f64; TERMS],
}

/// Weight that a step keeps with each later one of its kind: half after 23.
const FADING: f64 = 0.97;
/// A step that lasted so many times longer than expected was probably disturbed, and counts as this long.
const OUTLIER: f64 = 4.0;
/// Steps after which expectations are trusted enough to call something an outlier.
const TRUSTED: u32 = 16;
/// Pulls terms of which there is no evidence towards zero, weakly against the weight of 1 that a step has.
const RIDGE: f64 = 1e-6;

impl CostModel {
    /// The cost as far as it is known.
    pub fn cost(&self) -> StepCost {
        self.cost
    }

    /// Takes note that a step of `shape` took `seconds`.
    pub fn observe(&mut self, shape: Shape, seconds: f64) {
        if !seconds.is_finite() || seconds <= 0.0 {
            return;
        }
        let expected = self.cost.seconds(shape);
        let seconds = if self.seen >= TRUSTED { seconds.min(OUTLIER * expected.max(1e-6)) } else { seconds };
        self.seen = self.seen.saturating_add(1);
        let evidence = if shape.reads_prompts { &mut self.reading } else { &mut self.decoding };
        evidence.add(shape.features(), seconds);
        self.cost = self.fit();
    }

    /// Least squares over all evidence with no term below zero: terms that would be are left out, the worst first.
    fn fit(&self) -> StepCost {
        let mut used = [true; TERMS];
        loop {
            let terms = self.solve(used);
            let worst = (0..TERMS).filter(|&term| terms[term] < 0.0).min_by(|&a, &b| terms[a].total_cmp(&terms[b]));
            let Some(worst) = worst else {
                let [base, per_token, per_sequence, per_context] =
                    std::array::from_fn(|term| terms[term] / SCALE[term]);
                return StepCost { base, per_token, per_sequence, per_context };
            };
            used[worst] = false;
        }
    }

    /// Solves the normal equations for the used terms; the others are zero. Gaussian elimination without pivoting, which
    /// is stable for a matrix that is symmetric and, thanks to the ridge, positive definite.
    fn solve(&self, used: [bool; TERMS]) -> [f64; TERMS] {
        let mut rows = [[0.0; TERMS + 1]; TERMS];
        for (i, row) in rows.iter_mut().enumerate() {
            for j in 0..TERMS {
                let entry = self.decoding.matrix[i][j] + self.reading.matrix[i][j];
                row[j] = if used[i] && used[j] { entry } else { 0.0 };
            }
            // The ridge is relative to the scale of the squared weights, 1 / seconds^2.
            row[i] = if used[i] { row[i] * (1.0 + RIDGE) + f64::MIN_POSITIVE } else { 1.0 };
            row[TERMS] = if used[i] { self.decoding.vector[i] + self.reading.vector[i] } else { 0.0 };
        }
        for pivot in 0..TERMS {
            let upper = rows[pivot];
            for row in &mut rows[pivot + 1..] {
                let factor = row[pivot] / upper[pivot];
                for (entry, above) in row.iter_mut().zip(upper) {
                    *entry -= factor * above;
                }
            }
        }
        let mut terms = [0.0; TERMS];
        for i in (0..TERMS).rev() {
            let known: f64 = (i + 1..TERMS).map(|j| rows[i][j] * terms[j]).sum();
            let term = (rows[i][TERMS] - known) / rows[i][i];
            terms[i] = if term.is_finite() { term } else { 0.0 };
        }
        terms
    }
}

impl Evidence {
    fn add(&mut self, features: [f64; TERMS], seconds: f64) {
        // Dividing an equation by its right side makes its error relative.
        let weight = 1.0 / (seconds * seconds);
        for i in 0..TERMS {
            for j in 0..TERMS {
                self.matrix[i][j] = self.matrix[i][j] * FADING + weight * features[i] * features[j];
            }
            self.vector[i] = self.vector[i] * FADING + weight * features[i] * seconds;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRUE: StepCost = StepCost { base: 2e-3, per_token: 4e-4, per_sequence: 3e-4, per_context: 2e-7 };

    /// Steps as they come while a server is used: prompts of several lengths, and decoding in between.
    fn shapes() -> impl Iterator<Item = Shape> {
        (0..400usize).map(|i| {
            let decodes = i % 7;
            let shape =
                (0..decodes).fold(Shape::default(), |shape, d| shape.plus(Shape::of_rows(100 * d + i, 1, true, 0)));
            if i % 3 == 0 || decodes == 0 {
                shape.plus(Shape::of_rows(i % 512, 16 + i % 200, i % 2 == 0, 0))
            } else {
                shape
            }
        })
    }

    fn learnt(cost: StepCost, noise: impl Fn(usize) -> f64) -> CostModel {
        let mut model = CostModel::default();
        for (i, shape) in shapes().enumerate() {
            model.observe(shape, cost.seconds(shape) * noise(i));
        }
        model
    }

    fn assert_predicts(model: &CostModel, cost: StepCost, tolerance: f64) {
        for shape in shapes() {
            let (expected, exact) = (model.cost().seconds(shape), cost.seconds(shape));
            assert!((expected / exact - 1.0).abs() < tolerance, "{shape:?}: {expected} instead of {exact}");
        }
    }

    #[test]
    fn a_linear_cost_is_learnt_exactly() {
        assert_predicts(&learnt(TRUE, |_| 1.0), TRUE, 1e-3);
    }

    #[test]
    fn noise_averages_out() {
        let noisy = learnt(TRUE, |i| 1.0 + 0.2 * ((i * 7919 % 13) as f64 / 6.0 - 1.0));
        assert_predicts(&noisy, TRUE, 0.15);
    }

    #[test]
    fn a_disturbed_step_does_not_spoil_the_expectation() {
        let mut model = learnt(TRUE, |_| 1.0);
        model.observe(Shape::of_rows(0, 100, true, 0), 60.0);
        assert_predicts(&model, TRUE, 0.25);
    }

    #[test]
    fn a_machine_that_becomes_slower_is_noticed() {
        let mut model = learnt(TRUE, |_| 1.0);
        let slower = StepCost { base: 6e-3, per_token: 12e-4, per_sequence: 9e-4, per_context: 6e-7 };
        for shape in shapes() {
            model.observe(shape, slower.seconds(shape));
        }
        assert_predicts(&model, slower, 0.1);
    }

    #[test]
    fn hours_of_decoding_do_not_wash_out_the_cost_of_prompts() {
        let mut model = learnt(TRUE, |_| 1.0);
        for i in 0..100_000 {
            let shape = Shape::of_rows(200 + i % 1000, 1, true, 0);
            model.observe(shape, TRUE.seconds(shape));
        }
        let prompt = Shape::of_rows(0, 512, true, 0);
        assert!((model.cost().seconds(prompt) / TRUE.seconds(prompt) - 1.0).abs() < 0.1, "{:?}", model.cost());
    }

    #[test]
    fn no_term_is_ever_negative_or_infinite() {
        let mut model = CostModel::default();
        for (i, shape) in shapes().enumerate() {
            // Larger steps that are faster: nothing that the model could express.
            model.observe(shape, 1.0 / (1.0 + shape.tokens as f64) + 1e-9 * i as f64);
            let StepCost { base, per_token, per_sequence, per_context } = model.cost();
            for term in [base, per_token, per_sequence, per_context] {
                assert!(term >= 0.0 && term.is_finite(), "{:?}", model.cost());
            }
        }
    }

    #[test]
    fn nonsense_durations_are_ignored() {
        let mut model = CostModel::default();
        for seconds in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            model.observe(Shape::of_rows(0, 1, true, 0), seconds);
        }
        assert_eq!(model.cost(), StepCost::default());
    }

    #[test]
    fn the_rows_within_a_target_use_it_up_and_not_more() {
        let cases = [0, 1000, 50_000].into_iter().flat_map(|start| [0.05, 0.1, 1.0].map(|target| (start, target)));
        for ((start, target), scored) in cases.flat_map(|case| [(case, false), (case, true)]) {
            let beside = Shape::of_rows(700, 1, true, 0);
            let rows = TRUE.rows_within(beside, start, scored, target).unwrap();
            let of = |rows| {
                let scores = if scored { rows } else { 0 };
                TRUE.seconds(beside.plus(Shape::of_rows(start, rows, true, scores)))
            };
            assert!(rows == 0 || of(rows) <= target + 1e-5, "{rows} rows from {start} take {}", of(rows));
            assert!(of(rows + 2) > target, "{rows} rows from {start} leave room");
        }
    }

    #[test]
    fn rows_are_unknown_before_any_step_and_none_when_the_target_is_missed_already() {
        assert_eq!(StepCost::default().rows_within(Shape::default(), 0, false, 1.0), None);
        assert_eq!(TRUE.rows_within(Shape::of_rows(0, 1000, true, 0), 0, false, 0.1), Some(0));
        let free = StepCost { base: 1e-3, ..StepCost::default() };
        assert_eq!(free.rows_within(Shape::default(), 0, false, 0.1), Some(usize::MAX));
    }
}
