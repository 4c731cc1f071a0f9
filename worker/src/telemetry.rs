//! Log lines on stderr.

use std::io::IsTerminal;

use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, util::SubscriberInitExt};

use crate::cli::LogFormat;

/// Environment variable that says what is logged, in the syntax of `tracing-subscriber`.
pub const FILTER: &str = "ERNIE_LOG";

/// Starts logging. A second call changes nothing.
///
/// # Errors
/// A sentence when [`FILTER`] cannot be read.
pub fn start(format: LogFormat) -> Result<(), String> {
    let filter = match std::env::var(FILTER) {
        Ok(text) if !text.trim().is_empty() => EnvFilter::try_new(&text)
            .map_err(|error| format!("{FILTER} is {text:?}, which is no log filter: {error}"))?,
        _ => EnvFilter::new("info"),
    };
    let layer = fmt::layer().with_writer(std::io::stderr).with_target(false);
    let registry = tracing_subscriber::registry().with(filter);
    // A second start finds a subscriber in place, which is as good.
    let _ = match format {
        LogFormat::Text => registry.with(layer.with_ansi(std::io::stderr().is_terminal())).try_init(),
        LogFormat::Json => registry.with(layer.json().flatten_event(true)).try_init(),
    };
    Ok(())
}
