//! Requests from published traces.

use serde::Deserialize;

use crate::Request;

/// Why a trace cannot be read.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum TraceError {
    /// It is neither of the two forms.
    #[error(
        "the trace is neither CSV with the columns TIMESTAMP,ContextTokens,GeneratedTokens nor JSON lines with timestamp, \
         input_length and output_length"
    )]
    Form,
    /// A line makes no sense.
    #[error("line {line} of the trace: {what}")]
    Line {
        /// Which one, from 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// There is nothing in it.
    #[error("the trace has no requests")]
    Empty,
}

/// Tokens of a block of the Mooncake traces' `hash_ids`.
const BLOCK: u32 = 512;

#[derive(Deserialize)]
struct MooncakeLine {
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

/// Parses a trace in the form of the Azure LLM inference traces (CSV) or of Mooncake's (JSON lines), whichever it is. With
/// `prefix_cache`, prompt blocks of a Mooncake trace that came before count as cached.
///
/// # Errors
///
/// The first line that makes no sense, and why.
pub fn parse(text: &str, prefix_cache: bool) -> Result<Vec<Request>, TraceError> {
    let first = text.lines().next().unwrap_or_default();
    let mut requests = if first.trim_start().starts_with('{') {
        mooncake(text, prefix_cache)?
    } else if first.trim() == "TIMESTAMP,ContextTokens,GeneratedTokens" {
        azure(text)?
    } else {
        return Err(TraceError::Form);
    };
    requests.sort_by(|a, b| a.at.total_cmp(&b.at));
    let start = requests.first().ok_or(TraceError::Empty)?.at;
    requests.iter_mut().for_each(|request| request.at -= start);
    Ok(requests)
}

fn azure(text: &str) -> Result<Vec<Request>, TraceError> {
    let lines = text.lines().enumerate().skip(1).filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(index, line)| {
            let wrong = |what: &str| TraceError::Line { line: index + 1, what: format!("{what}: {line:?}") };
            let mut fields = line.trim().split(',');
            let time = fields.next().unwrap_or_default();
            let at: jiff::civil::DateTime = time.parse().map_err(|_| wrong("no timestamp in the first column"))?;
            let at = at.to_zoned(jiff::tz::TimeZone::UTC).map_err(|_| wrong("no such time"))?;
            let mut number = |name: &str| match fields.next().map(str::parse::<u32>) {
                Some(Ok(count)) => Ok(count.max(1)),
                _ => Err(wrong(name)),
            };
            let prompt = number("no number of prompt tokens in the second column")?;
            let output = number("no number of generated tokens in the third column")?;
            Ok(Request { at: at.timestamp().as_microsecond() as f64 * 1e-6, prompt, cached: 0, output })
        })
        .collect()
}

fn mooncake(text: &str, prefix_cache: bool) -> Result<Vec<Request>, TraceError> {
    let mut known = std::collections::HashSet::new();
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(index, line)| {
            let line: MooncakeLine = serde_json::from_str(line)
                .map_err(|error| TraceError::Line { line: index + 1, what: error.to_string() })?;
            if !(line.timestamp.is_finite() && line.timestamp >= 0.0) {
                return Err(TraceError::Line { line: index + 1, what: format!("timestamp {}", line.timestamp) });
            }
            let prompt = line.input_length.max(1);
            let hits = line.hash_ids.iter().take_while(|hash| known.contains(*hash)).count() as u32;
            known.extend(line.hash_ids);
            let cached = if prefix_cache { hits.saturating_mul(BLOCK).min(prompt - 1) } else { 0 };
            Ok(Request { at: line.timestamp * 1e-3, prompt, cached, output: line.output_length.max(1) })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_published_forms_are_read() {
        let azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n\
                     2023-11-16 18:15:50.9951690,396,0\n";
        let requests = parse(azure, false).expect("valid");
        assert_eq!((requests[0].at, requests[0].prompt, requests[0].output), (0.0, 374, 44));
        assert!((requests[1].at - 4.314_579).abs() < 1e-5 && requests[1].output == 1);
        let mooncake = "{\"timestamp\": 1000, \"input_length\": 1100, \"output_length\": 5, \"hash_ids\": [1, 2, 3]}\n\
                        {\"timestamp\": 4000, \"input_length\": 1024, \"output_length\": 5, \"hash_ids\": [1, 2]}\n";
        let requests = parse(mooncake, true).expect("valid");
        assert_eq!(requests[1], Request { at: 3.0, prompt: 1024, cached: 1023, output: 5 });
        assert_eq!(parse(mooncake, false).expect("valid")[1].cached, 0);
    }

    #[test]
    fn what_is_no_trace_is_refused_with_line_and_reason() {
        assert_eq!(parse("hello\n", false), Err(TraceError::Form));
        assert_eq!(parse("TIMESTAMP,ContextTokens,GeneratedTokens\n", false), Err(TraceError::Empty));
        let error = |text: &str| parse(text, false).expect_err("refused").to_string();
        let header = "TIMESTAMP,ContextTokens,GeneratedTokens\n";
        assert!(error(&format!("{header}2023-11-16 18:15:46,x,44")).contains("line 2"));
        assert!(error(&format!("{header}yesterday,1,44")).contains("yesterday"));
        assert!(error("{\"timestamp\": 1}").contains("input_length"));
    }
}
