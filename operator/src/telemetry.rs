//! Logs: one line an occurrence, as text for people or as JSON for machines.

use std::io::IsTerminal;

use thiserror::Error;
use tracing_subscriber::EnvFilter;

/// How a log line is written.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For machines.
    Json,
}

/// Why logging cannot start.
#[derive(Debug, Error)]
pub enum Error {
    /// Not a level and not a list of module=level.
    #[error("log level {level:?}: {source}: use error, warn, info, debug, trace, or module=level pairs with commas")]
    Level {
        /// What was given.
        level: String,
        /// What is wrong with it.
        source: tracing_subscriber::filter::ParseError,
    },
    /// Called twice.
    #[error("logging is set up already")]
    Twice,
}

/// Starts logging to standard error.
///
/// # Errors
/// When the level is none, or logging runs already.
pub fn start(format: LogFormat, level: &str) -> Result<(), Error> {
    let filter = EnvFilter::try_new(level).map_err(|source| Error::Level { level: level.to_owned(), source })?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    let started = match format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(false).try_init(),
    };
    started.map_err(|_| Error::Twice)
}
