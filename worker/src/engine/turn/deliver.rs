//! What a step gave, to whom it is due.

use std::time::Instant;

use crate::engine::client::{Delivery, End};
use crate::engine::request::{FailureKind, FinishReason};
use crate::engine::scheduler::{Part, SequenceId, Step};
use crate::executor::{Reading, Readout, StepOutput};

use super::{Turns, internal};

impl Turns {
    /// Chooses a token for each sequence that is due one, and sends it.
    pub(super) fn deliver(&mut self, step: &Step, output: StepOutput) {
        let StepOutput { logits, readings } = output;
        let mut readings = readings.into_iter();
        for ((part, ran), mut logits) in step.parts.iter().zip(&step.plan.sequences).zip(logits) {
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
            let chosen = match client.sample(&mut logits, &mut self.scratch) {
                Ok(chosen) => chosen,
                Err(failure) => {
                    if failure.kind == FailureKind::Internal {
                        tracing::error!(request = client.id(), "{failure}");
                    }
                    self.end(part.id, End::Failed(failure));
                    continue;
                }
            };
            let token = chosen.id;
            let (delivery, latency) = client.deliver(chosen, Instant::now());
            self.figures.token(latency);
            match delivery {
                Delivery::GoesOn => self.scheduler.append(part.id, token),
                Delivery::ReaderBehind => {
                    self.scheduler.append(part.id, token);
                    self.scheduler.pause(part.id);
                }
                Delivery::Complete(reason) => self.end(part.id, End::Finished(reason)),
            }
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
