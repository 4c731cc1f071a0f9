//! The model against the reference implementation's numbers: every golden folder and the demo model, on both
//! backends, at each level that this CPU has, in every way that the scheduler can run a sequence.

mod adapters;
mod command;
mod corruption;
mod demo;
mod determinism;
mod folders;
mod modes;
mod prompts;
mod quantization;
mod reference;
mod variants;
