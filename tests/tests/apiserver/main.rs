//! The in-memory API server itself, and the comparison that holds it against a real one.

mod conformance;
mod verbs;
