//! How long a call may take.

use std::time::Duration;

use tonic::{Status, metadata::MetadataMap};

use super::status;

/// For calls that do not say.
pub const DEFAULT: Duration = Duration::from_secs(10 * 60);
/// The longest; longer wishes are cut to this.
pub const LONGEST: Duration = Duration::from_secs(60 * 60);

/// The time that a call has, from its `grpc-timeout`.
///
/// # Errors
/// `INVALID_ARGUMENT` when the header cannot be read.
pub fn of(metadata: &MetadataMap) -> Result<Duration, Status> {
    let Some(value) = metadata.get("grpc-timeout") else { return Ok(DEFAULT) };
    let text = value.to_str().unwrap_or_default();
    let time = parse(text).ok_or_else(|| {
        status::invalid(
            "grpc-timeout",
            format!("{} is no timeout; send 1 to 8 digits and a unit of H, M, S, m, u or n", status::quoted(text)),
        )
    })?;
    Ok(time.min(LONGEST))
}

/// The gRPC specification's form: at most eight digits and a unit.
fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(timeout: &str) -> Result<Duration, Status> {
        let mut metadata = MetadataMap::new();
        metadata.insert("grpc-timeout", timeout.parse().expect("metadata"));
        of(&metadata)
    }

    #[test]
    fn a_call_without_a_timeout_gets_the_default() {
        assert_eq!(of(&MetadataMap::new()).expect("a time"), DEFAULT);
    }

    #[test]
    fn every_unit_is_read_and_long_ones_are_cut() {
        assert_eq!(with("1500m").expect("a time"), Duration::from_millis(1500));
        assert_eq!(with("2M").expect("a time"), Duration::from_secs(120));
        assert_eq!(with("0n").expect("a time"), Duration::ZERO);
        assert_eq!(with("99999999H").expect("a time"), LONGEST);
    }

    #[test]
    fn a_malformed_timeout_is_refused_with_its_value() {
        for text in ["", "S", "5", "5s", "-5S", "1.5S", "123456789S", "5é"] {
            let mut metadata = MetadataMap::new();
            match text.parse() {
                Ok(value) => metadata.insert("grpc-timeout", value),
                Err(_) => continue,
            };
            let status = of(&metadata).expect_err(text);
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            assert!(status.message().starts_with("grpc-timeout: \""), "{status}");
        }
    }
}
