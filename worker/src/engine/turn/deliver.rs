//! What a step gave, to whom it is due.

use std::time::{Duration, Instant};

use crate::engine::client::{Client, Delivery, End};
use crate::engine::request::{FailureKind, FinishReason};
use crate::engine::scheduler::{Part, SequenceId, Step};
use crate::executor::{Reading, Readout, StepOutput};

use super::{Turns, internal};

/// The most that a step waits for guides, for all of them together. Masks are worked out beside the forward pass and aim at a
/// p99 of a millisecond, so there is rarely anything to wait for. Whoever is a little late would otherwise wait for a whole
/// step; to all others five milliseconds are a twentieth of the usual target between two tokens.
const PATIENCE: Duration = Duration::from_millis(5);
/// The most that is waited for guides, when nothing can run, before the engine listens again.
const GLANCE: Duration = Duration::from_millis(1);

impl Turns {
    /// Chooses a token for each sequence that is due one, and sends it; one whose guide is too slow keeps its logits. Gives the
    /// time spent waiting for guides.
    pub(super) fn deliver(&mut self, step: &Step, output: StepOutput) -> Duration {
        let StepOutput { logits, readings } = output;
        let now = Instant::now();
        let mut readings = readings.into_iter();
        let mut late = Vec::new();
        for ((part, ran), logits) in step.parts.iter().zip(&step.plan.sequences).zip(logits) {
            if let Some(reading) = &ran.reading
                && let Some(readout) = readings.next()
            {
                self.deliver_reading(part, reading, readout);
            }
            if part.ends {
                self.end_without_answer(part.id);
            }
            if !part.samples {
                continue;
            }
            let Some(client) = self.clients.get_mut(part.id.0).and_then(Option::as_mut) else { continue };
            client.keep(logits);
            if client.wait(now) {
                self.choose(part.id);
            } else {
                late.push(part.id);
            }
        }
        self.wait_for_guides(&late, PATIENCE)
    }

    /// Chooses the tokens of those held back whose guides have become ready.
    pub(super) fn take_up(&mut self) {
        let held = self.held();
        self.wait_for_guides(&held, Duration::ZERO);
    }

    /// Waits for guides, since nothing can run. `false`: there is none to wait for.
    pub(super) fn stand_by(&mut self) -> bool {
        let held = self.held();
        self.wait_for_guides(&held, GLANCE);
        !held.is_empty()
    }

    /// Sequences that have logits, and whose guides were too slow.
    pub(super) fn held(&self) -> Vec<SequenceId> {
        let clients = self.clients.iter().enumerate();
        let held = clients.filter(|(_, client)| client.as_ref().is_some_and(Client::is_held));
        held.map(|(index, _)| SequenceId(index)).collect()
    }

    /// Waits for the guides of these, and chooses the tokens of those that are ready in time. Gives the time spent waiting.
    fn wait_for_guides(&mut self, ids: &[SequenceId], patience: Duration) -> Duration {
        let until = Instant::now() + patience;
        let mut waited = Duration::ZERO;
        for &id in ids {
            let Some(client) = self.clients.get_mut(id.0).and_then(Option::as_mut) else { continue };
            let since = Instant::now();
            let ready = client.wait(until);
            waited += since.elapsed();
            if ready {
                self.choose(id);
            }
        }
        waited
    }

    /// Chooses the next token of a sequence that has logits, and sends it.
    fn choose(&mut self, id: SequenceId) {
        let Some(client) = self.clients.get_mut(id.0).and_then(Option::as_mut) else { return };
        let chosen = match client.sample(&mut self.scratch) {
            None => return,
            Some(Ok(chosen)) => chosen,
            Some(Err(failure)) => {
                if failure.kind == FailureKind::Internal {
                    tracing::error!(request = client.id(), "{failure}");
                }
                return self.end(id, End::Failed(failure));
            }
        };
        let token = chosen.id;
        let (delivery, latency) = client.deliver(chosen, Instant::now());
        self.figures.token(latency);
        match delivery {
            Delivery::GoesOn => self.scheduler.append(id, token),
            Delivery::ReaderBehind => {
                self.scheduler.append(id, token);
                self.scheduler.pause(id);
            }
            Delivery::Complete(reason) => self.end(id, End::Finished(reason)),
        }
    }

    /// Sends what a step read off a prompt.
    fn deliver_reading(&mut self, part: &Part, reading: &Reading, readout: Readout) {
        let Some(client) = self.clients.get_mut(part.id.0).and_then(Option::as_mut) else { return };
        let finite = match &readout {
            Readout::Scores(scores) => scores.iter().all(|score| score.log_sum_exp.is_finite()),
            Readout::HiddenSum(sum) => sum.iter().all(|number| number.is_finite()),
        };
        if !finite {
            tracing::error!(request = client.id(), "the model computed something that is not finite");
            return self.end(part.id, internal("the model computed something that is not finite".to_owned()));
        }
        match (reading, readout) {
            (Reading::Scores { targets, .. }, Readout::Scores(scores)) => {
                let room = client.deliver_scores(targets, scores, Instant::now());
                if !room {
                    self.scheduler.pause(part.id);
                }
            }
            (Reading::HiddenSum { .. }, Readout::HiddenSum(sum)) if self.scheduler.rows_unread(part.id) > 0 => {
                self.scheduler.keep_sum(part.id, sum);
            }
            (Reading::HiddenSum { .. }, Readout::HiddenSum(sum)) => client.deliver_sum(&sum),
            // `forward` has seen that they fit.
            _ => {}
        }
    }

    fn end_without_answer(&mut self, id: SequenceId) {
        if let Some(client) = self.clients.get_mut(id.0).and_then(Option::as_mut) {
            client.note_prompt_read(Instant::now());
        }
        self.end(id, End::Finished(FinishReason::NoAnswer));
    }
}
