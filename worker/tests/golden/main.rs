//! The model against the reference implementation's numbers: every golden folder and the demo model, on both
//! backends, at each level that this CPU has, alone, in batches and in chunks.

mod adapters;
mod command;
mod corruption;
mod demo;
mod folders;
mod reference;
mod variants;
