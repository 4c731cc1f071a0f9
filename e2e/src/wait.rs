//! Waiting for a condition, never for a time.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Longest pause between two looks at a condition.
const POLL_MAX: Duration = Duration::from_millis(100);

/// Calls `look` until it gives a value, and returns that value.
///
/// `look` answers `Ok(Some(value))` when the condition holds and `Ok(None)` when it does not hold yet. An error
/// ends the wait at once: turn an error that may pass into `Ok(None)`. `what` completes the sentence "waited 30 s
/// for …" of the error after `deadline`.
pub async fn until<T>(what: &str, deadline: Duration, mut look: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(5);
    loop {
        let left = deadline.saturating_sub(start.elapsed());
        match tokio::time::timeout(left.max(Duration::from_millis(1)), look()).await {
            Ok(Ok(Some(value))) => return Ok(value),
            Ok(Ok(None)) if !left.is_zero() => {}
            Ok(Err(error)) => return Err(error),
            Ok(Ok(None)) | Err(_) => bail!("waited {} s in vain for {what}", deadline.as_secs_f32()),
        }
        tokio::time::sleep(pause.min(left)).await;
        pause = (pause * 3 / 2).min(POLL_MAX);
    }
}

/// As [`until`], for a place without an async runtime.
pub fn until_blocking<T>(what: &str, deadline: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(value) = look()? {
            return Ok(value);
        }
        if start.elapsed() >= deadline {
            bail!("waited {} s in vain for {what}", deadline.as_secs_f32());
        }
        std::thread::sleep(pause);
        pause = (pause * 3 / 2).min(POLL_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_condition_that_never_holds_ends_with_a_sentence_that_names_it() {
        let error = until::<()>("the moon", Duration::from_millis(20), async || Ok(None)).await.unwrap_err();
        assert!(error.to_string().contains("for the moon"), "{error}");
    }

    #[tokio::test]
    async fn a_look_that_hangs_does_not_outlive_the_deadline() {
        let hang = async || {
            std::future::pending::<()>().await;
            Ok(Some(()))
        };
        assert!(until("a call", Duration::from_millis(20), hang).await.is_err());
    }

    #[tokio::test]
    async fn an_error_ends_the_wait_at_once() {
        let error = until::<()>("x", Duration::from_secs(600), async || bail!("broken")).await.unwrap_err();
        assert_eq!(error.to_string(), "broken");
    }
}
