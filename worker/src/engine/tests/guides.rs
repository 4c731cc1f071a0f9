//! Answers that a guide follows.

use super::*;
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
