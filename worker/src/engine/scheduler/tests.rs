use std::collections::{BTreeMap, HashSet};

use proptest::prelude::*;

use super::*;
use crate::executor::{LogitRows, SequenceStep};

const UNLIMITED: Pace = Pace::UNLIMITED;

fn bounds(max_num_seqs: usize, max_num_batched_tokens: usize) -> Bounds {
    Bounds { max_num_seqs, max_num_batched_tokens, long_prefill_token_threshold: usize::MAX, prefix_caching: true }
}

fn scheduler(bounds: Bounds, blocks: usize) -> Scheduler {
    Scheduler::new(bounds, Blocks::new(blocks, [1; 32]))
}

fn prompt(first: u32, len: usize) -> NewSequence {
    NewSequence {
        tokens: (first..).take(len).collect(),
        position_ids: None,
        adapter: None,
        scope: vec![],
        rank_micros: 0,
        tenant: "".into(),
        reading: None,
        generates: true,
    }
}

/// Plans and commits one step, and appends `token` to each sequence that samples.
fn turn(scheduler: &mut Scheduler, pace: &Pace, token: u32) -> Step {
    let mut step = Step::default();
    scheduler.plan(pace, &mut step);
    scheduler.commit(&step);
    for part in step.parts.iter().filter(|part| part.samples) {
        scheduler.append(part.id, token);
    }
    scheduler.audit().unwrap();
    step
}

fn rows(step: &Step) -> Vec<(usize, usize)> {
    step.parts.iter().map(|part| (part.id.0, part.rows)).collect()
}

#[test]
fn prompts_and_decoding_sequences_share_a_step_without_padding() {
    let mut scheduler = scheduler(bounds(8, 512), 100);
    scheduler.add(prompt(0, 40));
    turn(&mut scheduler, &UNLIMITED, 7);
    scheduler.add(prompt(1000, 5));
    scheduler.add(prompt(2000, 70));
    let step = turn(&mut scheduler, &UNLIMITED, 7);
    assert_eq!(rows(&step), [(0, 1), (1, 5), (2, 70)]);
    assert_eq!((step.decode_rows, step.prompt_rows(), step.shape.tokens), (1, 75, 76));
    assert!(step.parts.iter().all(|part| part.samples));
}

#[test]
fn a_long_prompt_is_read_in_pieces_of_the_threshold_beside_others() {
    let bounds = Bounds { long_prefill_token_threshold: 7, ..bounds(2, 512) };
    let mut scheduler = scheduler(bounds, 10);
    scheduler.add(prompt(0, 15));
    scheduler.add(prompt(1000, 4));
    let steps: Vec<_> = (0..4).map(|_| rows(&turn(&mut scheduler, &UNLIMITED, 7))).collect();
    assert_eq!(steps, [[(0, 7), (1, 4)], [(1, 1), (0, 7)], [(0, 1), (1, 1)], [(0, 1), (1, 1)]]);
}

#[test]
fn a_step_says_which_tokens_go_where() {
    let mut scheduler = scheduler(bounds(2, 64), 10);
    scheduler.add(NewSequence { adapter: Some(3), ..prompt(500, 70) });
    let first = turn(&mut scheduler, &UNLIMITED, 7);
    let part = &first.plan.sequences[0];
    assert_eq!((part.start, part.tokens.len(), part.tokens[0], part.blocks.len()), (0, 64, 500, 2));
    assert_eq!((part.logits, part.adapter, part.position_ids.as_ref()), (LogitRows::None, Some(3), None));
    let second = turn(&mut scheduler, &UNLIMITED, 7);
    let part = &second.plan.sequences[0];
    assert_eq!((part.start, part.tokens.as_slice()), (64, [564, 565, 566, 567, 568, 569].as_slice()));
    assert_eq!((part.blocks.len(), part.logits), (3, LogitRows::Last));
}

#[test]
fn given_positions_are_passed_on_and_keep_the_prompt_out_of_the_cache() {
    let mut scheduler = scheduler(bounds(2, 64), 10);
    let odd = NewSequence { position_ids: Some(vec![9; 40]), ..prompt(500, 40) };
    let id = scheduler.add(odd.clone());
    let step = turn(&mut scheduler, &UNLIMITED, 7);
    assert_eq!(step.plan.sequences[0].position_ids, Some(vec![9; 40]));
    let step = turn(&mut scheduler, &UNLIMITED, 7);
    assert_eq!(step.plan.sequences[0].position_ids, Some(vec![10]));
    scheduler.remove(id);
    scheduler.add(odd);
    scheduler.add(prompt(500, 40));
    let step = turn(&mut scheduler, &UNLIMITED, 7);
    assert!(step.started.iter().all(|started| started.cached == 0));
}

#[test]
fn a_prompt_that_was_read_before_starts_behind_its_full_blocks() {
    let mut scheduler = scheduler(bounds(2, 512), 20);
    let id = scheduler.add(prompt(0, 100));
    turn(&mut scheduler, &UNLIMITED, 7);
    scheduler.remove(id);
    let same = scheduler.add(prompt(0, 100));
    let step = turn(&mut scheduler, &UNLIMITED, 7);
    assert_eq!(step.started, [Started { id: same, cached: 96, first: true }]);
    assert_eq!(rows(&step), [(same.0, 4)]);
}

#[test]
fn the_last_token_of_a_prompt_always_runs() {
    let mut scheduler = scheduler(bounds(2, 512), 20);
    scheduler.add(prompt(0, 96));
    turn(&mut scheduler, &UNLIMITED, 7);
    let same = scheduler.add(prompt(0, 96));
    let step = turn(&mut scheduler, &UNLIMITED, 7);
    assert_eq!(step.started, [Started { id: same, cached: 64, first: true }]);
}

#[test]
fn running_sequences_share_the_blocks_of_a_common_beginning() {
    let mut scheduler = scheduler(bounds(4, 512), 20);
    scheduler.add(prompt(0, 65));
    turn(&mut scheduler, &UNLIMITED, 7);
    assert_eq!(scheduler.pool().free(), 17);
    let mut longer = prompt(0, 65);
    longer.tokens.extend([99; 20]);
    scheduler.add(longer);
    let step = turn(&mut scheduler, &UNLIMITED, 7);
    assert_eq!(step.started[0].cached, 64);
    assert_eq!(scheduler.pool().free(), 16);
}

#[test]
fn cached_prompts_are_not_shared_across_scopes() {
    let mut scheduler = scheduler(bounds(4, 512), 20);
    scheduler.add(NewSequence { scope: vec![b"one".to_vec()], ..prompt(0, 65) });
    turn(&mut scheduler, &UNLIMITED, 7);
    scheduler.add(NewSequence { scope: vec![b"two".to_vec()], ..prompt(0, 65) });
    let step = turn(&mut scheduler, &UNLIMITED, 7);
    assert_eq!(step.started[0].cached, 0);
}

#[test]
fn without_prefix_caching_nothing_is_found() {
    let mut scheduler = scheduler(Bounds { prefix_caching: false, ..bounds(4, 512) }, 20);
    for _ in 0..2 {
        scheduler.add(prompt(0, 65));
        assert_eq!(turn(&mut scheduler, &UNLIMITED, 7).started[0].cached, 0);
    }
}

#[test]
fn no_more_sequences_run_than_may() {
    let mut scheduler = scheduler(bounds(2, 512), 100);
    for _ in 0..3 {
        scheduler.add(prompt(0, 5));
    }
    let step = turn(&mut scheduler, &UNLIMITED, 7);
    assert_eq!((step.parts.len(), scheduler.running(), scheduler.waiting()), (2, 2, 1));
    scheduler.remove(step.parts[0].id);
    assert_eq!(turn(&mut scheduler, &UNLIMITED, 7).parts.len(), 2);
}

#[test]
fn a_sequence_that_needs_a_block_preempts_the_last_in_line() {
    let mut scheduler = scheduler(bounds(4, 512), 4);
    let first = scheduler.add(prompt(0, 31));
    let second = scheduler.add(prompt(1000, 31));
    turn(&mut scheduler, &UNLIMITED, 7);
    turn(&mut scheduler, &UNLIMITED, 7);
    // Both are about to fill their first block; two more are free, then none.
    let mut preempted = vec![];
    for _ in 0..70 {
        preempted.extend(turn(&mut scheduler, &UNLIMITED, 7).preempted);
    }
    assert_eq!(preempted, [second]);
    assert!(scheduler.tokens(first).len() > 100, "the first goes on");
    scheduler.remove(first);
    let step = turn(&mut scheduler, &UNLIMITED, 7);
    assert_eq!(step.started.len(), 1);
    assert!(!step.started[0].first);
}

#[test]
fn the_last_in_line_preempts_itself_rather_than_another() {
    let mut scheduler = scheduler(bounds(4, 512), 5);
    let first = scheduler.add(prompt(0, 90));
    let second = scheduler.add(prompt(1000, 20));
    // The first takes the last free block for its 97th token; then the second needs one for its 33rd.
    for _ in 0..13 {
        assert_eq!(turn(&mut scheduler, &UNLIMITED, 7).parts.len(), 2);
    }
    let step = turn(&mut scheduler, &UNLIMITED, 7);
    assert_eq!((step.preempted.as_slice(), rows(&step).as_slice()), ([second].as_slice(), [(first.0, 1)].as_slice()));
}

#[test]
fn a_smaller_priority_value_comes_first_and_waiting_makes_up_for_it() {
    let mut scheduler = scheduler(bounds(1, 512), 100);
    let seconds = |seconds: i64| seconds * 1_000_000;
    let running = scheduler.add(prompt(0, 5));
    turn(&mut scheduler, &UNLIMITED, 7);
    // Ageing of 10 s a step of priority: rank = arrival + 10 s * priority.
    let patient = scheduler.add(NewSequence { rank_micros: seconds(10), ..prompt(0, 5) });
    let urgent = scheduler.add(NewSequence { rank_micros: seconds(1), ..prompt(0, 5) });
    let late = scheduler.add(NewSequence { rank_micros: seconds(11), ..prompt(0, 5) });
    let mut order = vec![];
    let mut last = running;
    for _ in 0..3 {
        scheduler.remove(last);
        last = turn(&mut scheduler, &UNLIMITED, 7).started[0].id;
        order.push(last);
    }
    assert_eq!(order, [urgent, patient, late]);
}

#[test]
fn a_paused_sequence_keeps_its_blocks_until_somebody_needs_them() {
    let mut scheduler = scheduler(bounds(4, 512), 4);
    let slow = scheduler.add(prompt(0, 60));
    turn(&mut scheduler, &UNLIMITED, 7);
    scheduler.pause(slow);
    assert!(!scheduler.has_work());
    assert!(turn(&mut scheduler, &UNLIMITED, 7).is_empty());
    assert_eq!(scheduler.pool().free(), 2);
    scheduler.add(prompt(1000, 100));
    let step = turn(&mut scheduler, &UNLIMITED, 7);
    assert_eq!((step.preempted.as_slice(), step.started.len()), ([slow].as_slice(), 1));
    assert!(turn(&mut scheduler, &UNLIMITED, 7).started.is_empty(), "it stays out while it is paused");
}

#[test]
fn a_paused_sequence_gives_its_place_to_one_that_waits() {
    let mut scheduler = scheduler(bounds(1, 512), 100);
    let slow = scheduler.add(prompt(0, 60));
    turn(&mut scheduler, &UNLIMITED, 7);
    scheduler.pause(slow);
    let quick = scheduler.add(prompt(1000, 10));
    assert_eq!(turn(&mut scheduler, &UNLIMITED, 7).started[0].id, quick);
    scheduler.resume(slow);
    scheduler.remove(quick);
    let again = turn(&mut scheduler, &UNLIMITED, 7).started;
    assert_eq!(again, [Started { id: slow, cached: 32, first: false }]);
}

#[test]
fn a_sequence_without_a_next_token_takes_part_in_no_step_and_keeps_its_place() {
    let mut scheduler = scheduler(bounds(2, 512), 100);
    let held = scheduler.add(prompt(0, 40));
    let mut step = Step::default();
    scheduler.plan(&UNLIMITED, &mut step);
    scheduler.commit(&step);
    scheduler.audit().unwrap();
    assert!(!scheduler.has_work());
    let other = scheduler.add(prompt(1000, 5));
    let third = scheduler.add(prompt(2000, 5));
    for _ in 0..3 {
        let step = turn(&mut scheduler, &UNLIMITED, 7);
        assert_eq!((rows(&step).len(), step.parts[0].id, step.preempted.len()), (1, other, 0));
    }
    scheduler.append(held, 7);
    scheduler.remove(other);
    let step = turn(&mut scheduler, &UNLIMITED, 7);
    assert_eq!(rows(&step), [(held.0, 1), (third.0, 5)]);
}

#[test]
fn prompts_are_read_in_pieces_that_keep_the_pace_while_others_decode() {
    let cost = StepCost { base: 0.01, per_token: 0.001, per_sequence: 0.0, per_context: 0.0 };
    let pace = Pace { cost, target: 0.1 };
    let mut scheduler = scheduler(bounds(8, 4096), 1000);
    scheduler.add(prompt(0, 10));
    turn(&mut scheduler, &pace, 7);
    scheduler.add(prompt(10_000, 1000));
    let mut steps = 0;
    loop {
        let step = turn(&mut scheduler, &pace, 7);
        assert!(cost.seconds(step.shape) <= pace.target + 1e-9, "{:?}", step.shape);
        assert_eq!(step.decode_rows, 1, "the first sequence decodes in every step");
        steps += 1;
        if step.parts.iter().filter(|part| part.samples).count() == 2 {
            break;
        }
        assert!(steps < 20);
    }
    assert!((12..=16).contains(&steps), "90 rows a step at most: {steps}");
}

#[test]
fn a_prompt_that_is_scored_is_read_in_smaller_pieces_since_each_row_costs_logits() {
    let cost = StepCost { base: 0.01, per_token: 1e-4, per_sequence: 3e-4, ..StepCost::default() };
    let pace = Pace { cost, target: 0.1 };
    let chunk = |reading: Option<RowReading>| {
        let mut scheduler = scheduler(bounds(2, 4096), 100);
        scheduler.add(prompt(0, 4));
        turn(&mut scheduler, &UNLIMITED, 7);
        scheduler.add(NewSequence { reading, ..prompt(1000, 2000) });
        let step = turn(&mut scheduler, &pace, 7);
        (step.parts[1].rows, cost.seconds(step.shape))
    };
    let (read, _) = chunk(None);
    let (scored, seconds) = chunk(Some(RowReading { rows: 0..1999, kind: RowReadingKind::Scores { top: 0 } }));
    assert_eq!((read, scored), (864, 192));
    assert!(seconds <= pace.target, "{seconds}");
}

#[test]
fn prompts_make_progress_even_when_decoding_alone_misses_the_pace() {
    let pace = Pace { cost: StepCost { base: 5.0, per_token: 1.0, ..StepCost::default() }, target: 0.1 };
    let mut scheduler = scheduler(bounds(8, 4096), 1000);
    scheduler.add(prompt(0, 10));
    turn(&mut scheduler, &pace, 7);
    scheduler.add(prompt(10_000, 100));
    assert_eq!(turn(&mut scheduler, &pace, 7).prompt_rows(), 32);
}

#[test]
fn a_long_prompt_leaves_room_for_short_ones_behind_it() {
    let mut scheduler = scheduler(bounds(8, 256), 1000);
    let long = scheduler.add(prompt(0, 5000));
    turn(&mut scheduler, &UNLIMITED, 7);
    let short = scheduler.add(prompt(10_000, 20));
    let step = turn(&mut scheduler, &UNLIMITED, 7);
    assert_eq!(
        rows(&step),
        [(long.0, 224), (short.0, 20)],
        "what the short one leaves goes to the long one, in blocks"
    );
    let other = scheduler.add(prompt(20_000, 3000));
    assert_eq!(rows(&turn(&mut scheduler, &UNLIMITED, 7)), [(short.0, 1), (long.0, 128), (other.0, 127 - 31)]);
}

#[test]
fn before_anything_is_known_prompts_are_read_in_moderate_pieces() {
    let unknown = Pace { cost: StepCost::default(), target: 0.1 };
    let mut scheduler = scheduler(bounds(8, 4096), 1000);
    scheduler.add(prompt(0, 1000));
    scheduler.add(prompt(10_000, 1000));
    assert_eq!(turn(&mut scheduler, &unknown, 7).prompt_rows(), UNKNOWN_CHUNK);
}

#[test]
fn removal_at_every_stage_gives_everything_back() {
    let mut scheduler = scheduler(bounds(2, 64), 10);
    let ids: Vec<_> = (0..4).map(|i| scheduler.add(prompt(i * 1000, 80))).collect();
    turn(&mut scheduler, &UNLIMITED, 7);
    scheduler.pause(ids[3]);
    scheduler.pause(ids[1]);
    for id in ids {
        scheduler.remove(id);
        scheduler.audit().unwrap();
    }
    assert_eq!((scheduler.pool().free(), scheduler.running(), scheduler.waiting()), (10, 0, 0));
    assert_eq!(scheduler.queue.tenants(), 0);
}

/// A generator of numbers for long runs; SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits ^ (bits >> 31)) % bound as u64) as usize
    }
}

/// What the key-value cache of a real executor would hold: for each place of each block, a digest of the tokens up to
/// and with it. Checks that every row finds its own past there.
struct Cache {
    places: Vec<[u64; BLOCK_TOKENS]>,
}

impl Cache {
    fn run(&mut self, part: &SequenceStep, life: &Life) {
        let start = part.start as usize;
        assert_eq!(part.tokens, life.tokens[start..start + part.tokens.len()]);
        for place in 0..start + part.tokens.len() {
            let cell = &mut self.places[part.blocks[place / BLOCK_TOKENS] as usize][place % BLOCK_TOKENS];
            if place >= start {
                *cell = life.digests[place];
            } else {
                assert_eq!(*cell, life.digests[place], "place {place} does not hold this sequence's past");
            }
        }
    }
}

/// One sequence of the long run.
struct Life {
    tokens: Vec<u32>,
    /// For each token, a digest of the tokens up to and with it.
    digests: Vec<u64>,
    len: usize,
    tenant: usize,
    rank: i64,
    /// The step since which nothing but others has kept it from starting.
    ready: u64,
    paused: bool,
    started: bool,
    /// Its next token is not known yet.
    held: bool,
    /// Rows that something is still to be read off.
    unread: std::ops::Range<usize>,
}

impl Life {
    fn push(&mut self, token: u32) {
        let before = self.digests.last().copied().unwrap_or(0);
        self.tokens.push(token);
        self.digests.push((before ^ u64::from(token)).wrapping_mul(0x100_0000_01b3).rotate_left(29) + 1);
    }
}

/// A small engine in which everything happens that can, in random order.
struct World {
    random: Random,
    bounds: Bounds,
    scheduler: Scheduler,
    cache: Cache,
    lives: BTreeMap<SequenceId, Life>,
    step: Step,
    now: u64,
    summary: Summary,
}

/// What happened in a world.
#[derive(Debug, Default)]
struct Summary {
    preemptions: usize,
    hits: usize,
    finished: usize,
    held: usize,
    longest_wait: u64,
}

impl World {
    fn new(bounds: Bounds, blocks: usize, seed: u64) -> Self {
        Self {
            random: Random(seed),
            bounds,
            scheduler: scheduler(bounds, blocks),
            cache: Cache { places: vec![[0; BLOCK_TOKENS]; blocks] },
            lives: BTreeMap::new(),
            step: Step::default(),
            now: 0,
            summary: Summary::default(),
        }
    }

    fn turn(&mut self, most: usize) {
        while self.lives.len() < most && self.random.below(4) == 0 {
            self.arrive();
        }
        if self.random.below(20) == 0 {
            self.interfere();
        }
        self.take_up();
        self.plan();
        self.compute();
        self.now += 1;
    }

    fn arrive(&mut self) {
        let random = &mut self.random;
        let room = self.cache.places.len() * BLOCK_TOKENS;
        // Few distinct beginnings, so that many prompts share blocks.
        let beginning = random.below(6) as u32 * 10_000;
        let prompt_len = 1 + random.below(300.min(room - 1));
        let len = (prompt_len + 1 + random.below(400)).min(room);
        let common = random.below(prompt_len + 1);
        let mut tokens: Vec<u32> = (beginning..).take(common).collect();
        tokens.extend((common..prompt_len).map(|_| 1_000_000 + random.below(1000) as u32));
        // One in four has rows that are read; some of those generate nothing.
        let first = if random.below(4) == 0 { random.below(prompt_len) } else { prompt_len };
        let unread = first..prompt_len.saturating_sub(1).max(first);
        let generates = unread.is_empty() || random.below(2) == 0;
        let tenant = random.below(3);
        let rank = (self.now * 1000) as i64 + random.below(3) as i64 * 2_000_000;
        let id = self.scheduler.add(NewSequence {
            tokens: tokens.clone(),
            position_ids: None,
            adapter: None,
            scope: vec![vec![tenant as u8]],
            rank_micros: rank,
            tenant: tenant.to_string().into(),
            reading: (!unread.is_empty())
                .then(|| RowReading { rows: unread.clone(), kind: RowReadingKind::Scores { top: 0 } }),
            generates,
        });
        let (ready, paused, started, held) = (self.now, false, false, false);
        let mut life =
            Life { tokens: vec![], digests: vec![], len, tenant, rank, ready, paused, started, held, unread };
        tokens.into_iter().for_each(|token| life.push(token));
        self.lives.insert(id, life);
    }

    /// Somebody leaves, pauses or goes on.
    fn interfere(&mut self) {
        let ids: Vec<_> = self.lives.keys().copied().collect();
        let Some(&id) = ids.get(self.random.below(16)) else { return };
        let life = self.lives.get_mut(&id).unwrap();
        match self.random.below(3) {
            0 if life.paused => self.scheduler.resume(id),
            1 if !life.paused => self.scheduler.pause(id),
            _ => {
                self.scheduler.remove(id);
                self.lives.remove(&id);
                return;
            }
        }
        life.paused = !life.paused;
        life.ready = self.now;
    }

    fn plan(&mut self) {
        let slow = StepCost { base: 1.0, per_token: 0.01, per_sequence: 0.01, per_context: 1e-5 };
        let pace = [UNLIMITED, Pace { cost: slow, target: 2.0 }][self.random.below(2)];
        self.scheduler.plan(&pace, &mut self.step);
        let Self { step, bounds, scheduler, lives, .. } = self;
        assert!(step.shape.tokens <= bounds.max_num_batched_tokens);
        assert!(step.parts.len() <= bounds.max_num_seqs && scheduler.running() <= bounds.max_num_seqs);
        for id in &step.preempted {
            lives.get_mut(id).unwrap().held = false;
        }
        let held = lives.values().any(|life| life.held);
        assert!(!step.is_empty() || held || lives.values().all(|life| life.paused), "there was work, and nothing ran");
        self.summary.preemptions += step.preempted.len();
        for started in &step.started {
            self.summary.hits += started.cached / BLOCK_TOKENS;
            let life = &lives[&started.id];
            let overtaken =
                |other: &Life| other.tenant == life.tenant && other.rank < life.rank && !other.paused && !other.started;
            assert!(!lives.values().any(overtaken), "an earlier request of the same tenant still waits");
            if started.first {
                self.summary.longest_wait = self.summary.longest_wait.max(self.now - life.ready);
            }
            lives.get_mut(&started.id).unwrap().started = true;
        }
    }

    fn compute(&mut self) {
        let mut written = HashSet::new();
        for (part, planned) in self.step.parts.iter().zip(&self.step.plan.sequences) {
            let life = &self.lives[&part.id];
            assert!(!life.paused && !life.held && part.rows == planned.tokens.len() && part.rows > 0);
            let start = planned.start as usize;
            for &block in &planned.blocks[start / BLOCK_TOKENS..(start + part.rows).div_ceil(BLOCK_TOKENS)] {
                assert!(written.insert(block), "two sequences write to block {block} in one step");
            }
            self.cache.run(planned, life);
            let read = planned.reading.as_ref().map(|reading| reading.rows());
            let read = read.map_or(0..0, |rows| start + rows.start..start + rows.end);
            assert_eq!(read.len(), part.reads);
            let unread = &mut self.lives.get_mut(&part.id).unwrap().unread;
            let due = unread.start.max(start)..unread.end.min(start + part.rows);
            assert!(read == due || (read.is_empty() && due.is_empty()), "{read:?} were read instead of {due:?}");
            assert!(read.is_empty() || read.start == unread.start, "rows are read once and in order");
            unread.start += read.len();
            assert!(!(part.samples || part.ends) || unread.start == unread.end);
        }
        self.scheduler.commit(&self.step);
        for part in self.step.parts.iter().filter(|part| part.ends) {
            self.scheduler.remove(part.id);
            self.lives.remove(&part.id);
            self.summary.finished += 1;
        }
        let due: Vec<_> = self.step.parts.iter().filter(|part| part.samples).map(|part| part.id).collect();
        for id in due {
            if self.random.below(8) == 0 {
                self.lives.get_mut(&id).unwrap().held = true;
                self.summary.held += 1;
            } else {
                self.say(id);
            }
        }
    }

    /// Tokens that were late come.
    fn take_up(&mut self) {
        let held: Vec<_> = self.lives.iter().filter(|(_, life)| life.held).map(|(&id, _)| id).collect();
        for id in held {
            if self.random.below(3) == 0 {
                self.say(id);
            }
        }
    }

    /// A sequence gets its next token.
    fn say(&mut self, id: SequenceId) {
        let life = self.lives.get_mut(&id).unwrap();
        let token = self.random.below(1000) as u32;
        life.held = false;
        life.push(token);
        self.scheduler.append(id, token);
        assert_eq!(self.scheduler.tokens(id).last(), life.tokens.last());
        if life.tokens.len() == life.len {
            self.scheduler.remove(id);
            self.lives.remove(&id);
            self.summary.finished += 1;
        }
    }

    /// Ends everything, and checks that nothing is left.
    fn end(mut self) -> Summary {
        for id in std::mem::take(&mut self.lives).into_keys() {
            self.scheduler.remove(id);
        }
        self.scheduler.audit().unwrap();
        let left = (self.scheduler.waiting(), self.scheduler.queue.tenants());
        assert_eq!((self.scheduler.pool().free(), left), (self.cache.places.len(), (0, 0)));
        self.summary
    }
}

/// `SCHEDULER_STEPS` in the environment makes it longer.
#[test]
fn random_steps_lose_no_block_share_none_wrongly_starve_nobody_and_keep_the_order() {
    let steps: usize = std::env::var("SCHEDULER_STEPS").ok().map_or(200_000, |steps| steps.parse().unwrap());
    let mut world = World::new(bounds(12, 256), 128, 2);
    for step in 0..steps {
        world.turn(16);
        if step % 1000 == 0 {
            world.scheduler.audit().unwrap();
        }
    }
    let summary = world.end();
    // The run was about something: all of these happen again and again.
    let Summary { preemptions, hits, finished, held, longest_wait } = summary;
    assert!([preemptions, hits, finished, held].into_iter().all(|count| count > steps / 1000), "{summary:?}");
    // Priorities are worth up to 4,000 steps of waiting.
    assert!(longest_wait < 8_000, "{summary:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn engines_of_any_size_keep_every_invariant(
        (max_num_seqs, spare_tokens) in (1usize..9, 0usize..200),
        long_prefill_token_threshold in prop_oneof![Just(usize::MAX), 1usize..100],
        prefix_caching: bool,
        blocks in 1usize..40,
        most in 1usize..16,
        seed: u64,
    ) {
        let max_num_batched_tokens = max_num_seqs + spare_tokens;
        let bounds = bounds(max_num_seqs, max_num_batched_tokens);
        let mut world = World::new(Bounds { long_prefill_token_threshold, prefix_caching, ..bounds }, blocks, seed);
        for _ in 0..300 {
            world.turn(most);
            prop_assert_eq!(world.scheduler.audit(), Ok(()));
        }
        world.end();
    }
}
