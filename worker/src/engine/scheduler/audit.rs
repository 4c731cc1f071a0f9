//! What must hold at any time.

use super::{Scheduler, Stage};
use crate::executor::BLOCK_TOKENS;

impl Scheduler {
    /// Checks everything that must hold between sequences, queue and pool.
    ///
    /// # Errors
    /// A sentence about the first thing that does not hold.
    pub fn audit(&self) -> Result<(), String> {
        self.pool.audit(self.sequences.iter().map(|(_, sequence)| sequence.blocks()))?;
        if self.running.len() > self.bounds.max_num_seqs {
            return Err(format!("{} sequences are running", self.running.len()));
        }
        if !self.running.is_sorted_by_key(|&id| self.sequences[id].rank) {
            return Err("running sequences are out of order".to_owned());
        }
        for (id, sequence) in &self.sequences {
            let running = matches!(sequence.stage, Stage::Running(_));
            if running != self.running.contains(&id) {
                return Err(format!("sequence {id} runs without being listed, or the other way round"));
            }
            let places = sequence.blocks().len() * BLOCK_TOKENS;
            if sequence.computed() > places || sequence.computed() >= sequence.tokens.len() + usize::from(running) {
                return Err(format!("sequence {id} has computed more tokens than it has, or has places for"));
            }
            let unread = sequence.reading.as_ref().filter(|reading| !reading.rows.is_empty());
            if unread.is_some_and(|reading| reading.rows.start < sequence.computed()) {
                return Err(format!("sequence {id} has rows that ran and were not read"));
            }
        }
        Ok(())
    }
}
