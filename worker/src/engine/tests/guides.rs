//! Answers that a guide follows.

use std::sync::Condvar;

use super::*;
use crate::engine::cost::Shape;
use crate::sampling::Mask;

const END: u32 = 2;

/// Free for some tokens, then allows each of a list in turn with the end beside it, then the end alone.
struct Scripted {
    free: usize,
    turns: Vec<Mask>,
    ends: Mask,
    heard: Arc<Mutex<Vec<u32>>>,
    fails_at: Option<usize>,
}

impl Scripted {
    fn new(free: usize, turns: &[u32], fails_at: Option<usize>) -> (Box<Self>, Arc<Mutex<Vec<u32>>>) {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let turns = turns.iter().map(|&token| Mask::of([token, END], VOCAB)).collect();
        let ends = Mask::of([END], VOCAB);
        (Box::new(Self { free, turns, ends, heard: Arc::clone(&heard), fails_at }), heard)
    }
}

impl Guide for Scripted {
    fn wait(&mut self, _: Instant) -> bool {
        true
    }

    fn next(&mut self) -> Result<Next<'_>, GuideError> {
        let place = self.heard.lock().unwrap().len();
        if self.fails_at == Some(place) {
            return Err(GuideError::Failed("it is lost".to_owned()));
        }
        Ok(match place.checked_sub(self.free) {
            None => Next::Free(&[7, 8]),
            Some(turn) => self.turns.get(turn).map_or(Next::Over(&self.ends), Next::Within),
        })
    }

    fn advance(&mut self, token: u32) {
        self.heard.lock().unwrap().push(token);
    }
}

/// A guide that is slow: in which way, is what [`Guide::wait`] does.
struct Slow<F> {
    guide: Box<Scripted>,
    ready: F,
}

impl<F: FnMut(Instant) -> bool + Send> Guide for Slow<F> {
    fn wait(&mut self, until: Instant) -> bool {
        (self.ready)(until)
    }

    fn next(&mut self) -> Result<Next<'_>, GuideError> {
        self.guide.next()
    }

    fn advance(&mut self, token: u32) {
        self.guide.advance(token);
    }
}

fn slowly(guide: Box<Scripted>, ready: impl FnMut(Instant) -> bool + Send + 'static) -> Option<Box<dyn Guide>> {
    Some(Box::new(Slow { guide, ready }))
}

/// Keeps guides waiting until it is opened.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }

    /// Whether it is open in time.
    fn wait(&self, until: Instant) -> bool {
        let patience = until.saturating_duration_since(Instant::now());
        let open = self.0.0.lock().unwrap();
        *self.0.1.wait_timeout_while(open, patience, |open| !*open).unwrap().0
    }
}

/// Ready each third time it is asked.
fn dawdling() -> impl FnMut(Instant) -> bool + Send + 'static {
    let mut asked = 0;
    move |_| {
        asked += 1;
        asked % 3 == 0
    }
}

fn guided(ignore_eos: bool, min_tokens: u32) -> Request {
    Request { eos_token_ids: [END].into(), ignore_eos, min_tokens, ..request(0..40, 50) }
}

#[tokio::test]
async fn an_answer_follows_its_guide_and_ends_when_it_is_over() {
    let fixture = start(config(), 100);
    for (ignore_eos, min_tokens) in [(true, 0), (false, 40), (true, 40)] {
        let (guide, heard) = Scripted::new(3, &[11, 12, 13, 14], None);
        let stream = fixture.engine.submit_guided(guided(ignore_eos, min_tokens), Some(guide)).unwrap();
        let (tokens, finished) = finished(stream).await;
        assert_eq!(tokens[3..], [11, 12, 13, 14, END]);
        assert!(tokens[..3].iter().all(|token| ![7, 8, END].contains(token)), "{tokens:?}");
        assert_eq!(finished.reason, FinishReason::EndOfSequence(END));
        assert_eq!(*heard.lock().unwrap(), tokens[..7], "it hears of every token but the last");
    }
}

#[tokio::test]
async fn a_guided_answer_may_end_early_where_its_guide_lets_it() {
    let fixture = start(config(), 100);
    let mut early = guided(false, 0);
    early.sampling.logit_bias = vec![(END, 100.0)];
    let (guide, _) = Scripted::new(0, &[11, 12, 13], None);
    assert_eq!(finished(fixture.engine.submit_guided(early.clone(), Some(guide)).unwrap()).await.0, [END]);
    early.min_tokens = 2;
    let (guide, _) = Scripted::new(0, &[11, 12, 13], None);
    assert_eq!(finished(fixture.engine.submit_guided(early, Some(guide)).unwrap()).await.0, [11, 12, END]);
}

#[tokio::test]
async fn guided_answers_are_the_same_whatever_preempts_them() {
    let turns: Vec<u32> = (0..60).map(|turn| 20 + turn % 7).collect();
    let fixture = start(EngineConfig { max_num_batched_tokens: 64, ..config() }, 14);
    let mut streams = Vec::new();
    for index in 0..6 {
        let (guide, _) = Scripted::new(5, &turns, None);
        let prompt = request((0..60).map(|token| token * 3 + index), 70).prompt;
        let request = Request { prompt, max_tokens: Some(70), ..guided(true, 0) };
        streams.push(fixture.engine.submit_guided(request, Some(guide)).unwrap());
    }
    for stream in streams {
        let (tokens, _) = finished(stream).await;
        assert_eq!(tokens[5..], [&turns[..], &[END]].concat());
    }
    assert!(fixture.recorder.sum(|step| step.preemptions) > 0, "some were preempted");
}

#[tokio::test]
async fn a_guide_that_is_lost_fails_its_request_alone() {
    let fixture = start(config(), 100);
    let (guide, _) = Scripted::new(0, &[11, 12, 13], Some(2));
    let lost = fixture.engine.submit_guided(guided(false, 9), Some(guide)).unwrap();
    let (guide, _) = Scripted::new(0, &[11, 12, 13], None);
    let well = fixture.engine.submit_guided(guided(true, 0), Some(guide)).unwrap();
    let failure = failed(lost).await;
    assert_eq!((failure.kind, failure.message.as_str()), (FailureKind::Internal, "it is lost"));
    assert_eq!(finished(well).await.0, [11, 12, 13, END]);
}

#[tokio::test]
async fn an_answer_whose_guide_allows_only_what_its_request_forbids_fails_by_the_names_of_both() {
    let fixture = start(config(), 100);
    let mut contradicting = guided(false, 9);
    contradicting.sampling.bad_words = vec![vec![11, 12]];
    let (guide, _) = Scripted::new(0, &[11, 12, 13], None);
    let failure = failed(fixture.engine.submit_guided(contradicting, Some(guide)).unwrap()).await;
    assert_eq!(failure.kind, FailureKind::Unanswerable("sampling.constraint"));
    assert_eq!(
        failure.message,
        "sampling.constraint allows the answer after 1 token only tokens that bad_words and min_tokens forbid; allow one of \
         them, or change the constraint"
    );
    fixture.settled().await;
}

#[tokio::test]
async fn a_slow_guide_holds_back_its_own_answer_and_no_other() {
    let fixture = start(config(), 100);
    let gate = Gate::default();
    let slow = |guide| {
        let gate = gate.clone();
        slowly(guide, move |until| gate.wait(until))
    };
    let mut held =
        fixture.engine.submit_guided(guided(true, 0), slow(Scripted::new(0, &[11, 12, 13], None).0)).unwrap();
    assert!(matches!(held.next().await, Some(Event::Started(_))));
    for index in 0..4 {
        let free = request(index..index + 30, 40);
        let (tokens, _) = finished(fixture.engine.submit(free.clone()).unwrap()).await;
        assert_eq!(tokens, reference::answer(&free, 4096).0);
        let prompt = request((0..30).map(|token| token * 5 + index), 1).prompt;
        let quick = Request { prompt, ..guided(true, 0) };
        let (guide, _) = Scripted::new(0, &[21, 22], None);
        assert_eq!(finished(fixture.engine.submit_guided(quick, Some(guide)).unwrap()).await.0, [21, 22, END]);
    }
    assert_eq!(held.usage().completion_tokens, 0);
    let steps = fixture.controls.steps.load(std::sync::atomic::Ordering::SeqCst);
    gate.open();
    assert_eq!(finished(held).await.0, [11, 12, 13, END]);
    let more = fixture.controls.steps.load(std::sync::atomic::Ordering::SeqCst) - steps;
    assert_eq!(more, 3, "its first token comes of the logits that it had");
    fixture.settled().await;
}

#[tokio::test]
async fn an_answer_that_is_held_back_alone_ends_with_its_reader_or_its_deadline_and_leaves_its_place() {
    let fixture = start(EngineConfig { max_num_seqs: 1, max_num_batched_tokens: 64, ..config() }, 100);
    let never = |guide| slowly(guide, |_| false);
    let script = || Scripted::new(0, &[11, 12, 13], None).0;
    let mut left = fixture.engine.submit_guided(guided(true, 0), never(script())).unwrap();
    assert!(matches!(left.next().await, Some(Event::Started(_))));
    let deadline = Instant::now() + Duration::from_millis(100);
    let late = Request { deadline, ..guided(true, 0) };
    let late = fixture.engine.submit_guided(late, never(script())).unwrap();
    let waiting = fixture.engine.submit_guided(guided(true, 0), Some(script())).unwrap();
    drop(left);
    assert_eq!(failed(late).await.kind, FailureKind::DeadlineExceeded);
    assert_eq!(finished(waiting).await.0, [11, 12, 13, END]);
    assert!(fixture.engine.healthy());
    fixture.settled().await;
}

#[tokio::test]
async fn answers_are_the_same_however_often_they_are_held_back_and_preempted() {
    let submit = |fixture: &Fixture, index: u32, slow: bool| {
        let prompt = request((0..60).map(|token| token * 3 + index), 70).prompt;
        let request = Request { prompt, max_tokens: Some(70), ..guided(true, 0) };
        let (guide, _) = Scripted::new(50, &[20, 21, 22, 23, 24], None);
        let guide = if slow { slowly(guide, dawdling()) } else { Some(guide as Box<dyn Guide>) };
        fixture.engine.submit_guided(request, guide).unwrap()
    };
    let alone = start(config(), 100);
    let mut expected = Vec::new();
    for index in 0..6 {
        expected.push(finished(submit(&alone, index, false)).await.0);
    }
    let fixture = start(EngineConfig { max_num_batched_tokens: 64, ..config() }, 14);
    let streams: Vec<_> = (0..6).map(|index| submit(&fixture, index, index % 3 != 2)).collect();
    for (stream, expected) in streams.into_iter().zip(expected) {
        assert_eq!(finished(stream).await.0, expected);
    }
    assert!(fixture.recorder.sum(|step| step.preemptions) > 0, "some were preempted");
    fixture.settled().await;
}

#[tokio::test]
async fn what_guides_take_is_no_cost_of_a_step() {
    let fixture = start(config(), 100);
    let shut = Gate::default();
    // Uses up the patience of each step.
    let patient = move |until: Instant| until > Instant::now() && !shut.wait(until);
    let (guide, _) = Scripted::new(60, &[], None);
    let request = Request { max_tokens: Some(60), ..guided(true, 0) };
    finished(fixture.engine.submit_guided(request, slowly(guide, patient)).unwrap()).await;
    fixture.settled().await;
    let waited: Duration = fixture.recorder.steps.lock().unwrap().iter().map(|step| step.overhead).sum();
    assert!(waited > Duration::from_millis(60 * 4), "{waited:?}");
    let cost = fixture.recorder.latest().cost.seconds(Shape::of_rows(60, 1, true, 0));
    assert!(cost < 2.5e-3, "a step is thought to take {cost} s");
}
