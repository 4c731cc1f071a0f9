//! From pages of one process to samples: what a page does not say itself follows from the one before it.

use super::exposition::Page;
use super::moment::Moment;
use super::observation::Sample;
use super::policy::Slo;

/// What is remembered of one worker between two pages.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Meter {
    last: Option<(Page, Sample)>,
    /// Late answers that have not been set against a first token yet.
    late: f64,
}

impl Meter {
    /// Takes a page in. `sequences` is the most that run at once, 0 when unknown; `at` is when the page was read.
    ///
    /// Two totals are made here. Requests accepted are those that ended, run or wait; a request that ends between two of
    /// these figures must not look like a counter that fell. Requests judged are first tokens, each good unless it was late
    /// or an answer with late tokens ended meanwhile.
    pub fn read(&mut self, page: Page, slo: &Slo, sequences: f64, at: Moment) -> Sample {
        let before = self.last.take().filter(|(last, _)| continues(last, &page));
        let present = page.finished + page.running + page.waiting;
        let (accepted, judged, good) = match &before {
            Some((last, sample)) => {
                let judged = page.first_token.count - last.first_token.count;
                self.late += (page.late(slo) - last.late(slo)).max(0.0);
                let bad = self.late.min(judged);
                self.late -= bad;
                (present.max(sample.accepted), sample.judged + judged, sample.good + judged - bad)
            }
            None => {
                self.late = 0.0;
                let judged = page.first_token.count;
                (present, judged, (judged - page.late(slo)).max(0.0))
            }
        };
        let sample = Sample {
            at,
            accepted,
            rejected: page.rejected,
            finished: page.finished,
            prompt_tokens: page.prompt_tokens,
            output_tokens: page.output_tokens,
            steps: page.steps,
            step_seconds: page.step_seconds,
            prefill_tokens: page.prefill_tokens,
            decode_tokens: page.decode_tokens,
            kv_token_steps: page.kv_token_steps,
            judged,
            good: good.clamp(0.0, judged),
            running: page.running,
            waiting: page.waiting,
            kv_used: page.kv_usage * page.kv_capacity,
            kv_capacity: page.kv_capacity,
            max_num_seqs: sequences,
        };
        self.last = Some((page, sample));
        sample
    }

    /// When the process that wrote the last page began, as a mark that tells processes apart.
    pub fn process(&self) -> Option<u64> {
        self.last.as_ref().map(|(page, _)| page.started.to_bits())
    }
}

/// Whether a page comes from the process that wrote the one before.
fn continues(last: &Page, page: &Page) -> bool {
    last.started == page.started && last.totals().iter().zip(page.totals()).all(|(then, now)| *then <= now)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scale::exposition::{parse, tests::page};

    const SLO: Slo = Slo { ttft: 1.0, itl: 1.0, attainment: 0.99 };

    fn at(seconds: f64) -> Moment {
        Moment::from_seconds(seconds)
    }

    fn read(text: &str) -> Page {
        parse(text.as_bytes()).expect("well formed")
    }

    #[test]
    fn a_page_becomes_a_sample() {
        let sample = Meter::default().read(read(&page(1000.0, 20.0)), &SLO, 64.0, at(5.0));
        assert_eq!((sample.accepted, sample.finished, sample.rejected), (24.0, 21.0, 3.0));
        assert_eq!((sample.kv_used, sample.kv_capacity, sample.max_num_seqs), (400.0, 1600.0, 64.0));
        assert_eq!((sample.judged, sample.good, sample.at), (20.0, 20.0, at(5.0)));
    }

    #[test]
    fn a_request_that_ends_between_two_figures_is_no_reset() {
        let mut meter = Meter::default();
        let first = read(&page(1000.0, 20.0));
        // It ended, and was counted as running a moment before.
        let second = Page { running: 1.0, ..first.clone() };
        let before = meter.read(first, &SLO, 0.0, at(0.0)).accepted;
        assert_eq!(meter.read(second, &SLO, 0.0, at(5.0)).accepted, before);
    }

    #[test]
    fn late_tokens_count_against_first_tokens_and_totals_never_fall() {
        let mut meter = Meter::default();
        let strict = Slo { ttft: 0.1, itl: 0.1, attainment: 0.99 };
        let mut last = meter.read(read(&page(1000.0, 20.0)), &strict, 0.0, at(0.0));
        for requests in [20.0, 30.0, 30.0, 60.0] {
            let next = meter.read(read(&page(1000.0, requests)), &strict, 0.0, at(requests));
            assert!(next.judged >= last.judged && next.good >= last.good && next.good <= next.judged, "{next:?}");
            last = next;
        }
        // Half of the first tokens and half of the answers were late.
        assert_eq!((last.judged, last.good), (60.0, 0.0));
    }

    #[test]
    fn another_process_starts_over_even_with_higher_counters() {
        let mut meter = Meter::default();
        meter.read(read(&page(1000.0, 20.0)), &SLO, 0.0, at(0.0));
        let mark = meter.process();
        let sample = meter.read(read(&page(2000.0, 5.0)), &SLO, 0.0, at(5.0));
        assert_eq!((sample.accepted, sample.judged), (9.0, 5.0));
        assert_ne!(meter.process(), mark);
    }
}
