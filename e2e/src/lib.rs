//! A real Kubernetes cluster on one machine, and the handle by which tests use and break it.

pub mod cache;
pub mod command;
pub mod components;
pub mod control;
mod health;
mod host;
pub mod images;
pub mod init;
pub mod lifecycle;
mod pki;
pub mod plan;
pub mod progress;
mod sandbox;
pub mod wait;
