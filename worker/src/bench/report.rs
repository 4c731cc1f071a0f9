//! What `bench` prints: one JSON object, or the same figures as lines.

use std::io::{Write, stdout};

use ernie_kernels::Level;
use serde_json::{Map, Value, json};

use super::figures::{Answer, Percentiles, Spread};
use super::memory::memory;
use super::{BenchArgs, Point, local, remote};

/// Figures by name, in the order in which they are printed.
pub(super) type Figures = Map<String, Value>;

/// Of the engine of this process.
pub(super) fn of_engine(args: &BenchArgs, point: Point, measured: &local::Measured) -> Figures {
    let mut figures = Map::new();
    let plan = &measured.plan;
    rate(&mut figures, "prefill_tokens_per_second", measured.rates.iter().map(|rates| rates.prefill).collect());
    rate(&mut figures, "decode_tokens_per_second", measured.rates.iter().filter_map(|rates| rates.decode).collect());
    rate(&mut figures, "generated_tokens_per_second", measured.rates.iter().map(|rates| rates.generated).collect());
    put(&mut figures, "ttft_seconds", Percentiles::of(measured.ttft.clone()));
    put(&mut figures, "itl_seconds", Percentiles::of(measured.itl.clone()));
    put(&mut figures, "load_seconds", Some(measured.load_seconds));
    put(&mut figures, "start_to_first_token_seconds", measured.start_to_first_token_seconds);
    put(&mut figures, "peak_rss_bytes", memory("self", "VmHWM"));
    put(&mut figures, "weights_bytes", Some(plan.weight_bytes));
    put(&mut figures, "level", Some(args.level.unwrap_or_else(Level::best).name()));
    put(&mut figures, "dtype", Some(plan.dtype));
    put(&mut figures, "quantization", Some(plan.quantization));
    put(&mut figures, "kv_cache_dtype", Some(plan.kv_cache_dtype));
    put(&mut figures, "threads", Some(measured.threads));
    for (name, value) in [
        ("prompt", point.prompt),
        ("generate", args.generate),
        ("concurrency", point.concurrency),
        ("max_num_seqs", args.max_num_seqs.unwrap_or(point.concurrency).min(point.concurrency)),
        ("depth", args.depth),
        ("repetitions", args.repetitions),
    ] {
        put(&mut figures, name, Some(value));
    }
    figures
}

/// Of a server.
pub(super) fn of_server(args: &BenchArgs, measured: remote::Measured) -> Figures {
    let mut figures = Map::new();
    let seconds = measured.seconds.max(f64::MIN_POSITIVE);
    let answers: Vec<&Answer> = measured.answers.iter().map(|(_, answer)| answer).collect();
    let per_second = |count: usize| count as f64 / seconds;
    let good = answers.iter().filter(|answer| is_good(args, answer)).count();
    let failed: usize = measured.errors.values().sum();
    put(&mut figures, "requests", Some(answers.len() + failed));
    put(&mut figures, "answers", Some(answers.len()));
    put(&mut figures, "seconds", Some(seconds));
    put(&mut figures, "requests_per_second", Some(per_second(answers.len())));
    put(&mut figures, "goodput_requests_per_second", Some(per_second(good)));
    let all = answers.len() + failed;
    put(&mut figures, "attainment", (all > 0).then(|| good as f64 / all as f64));
    let prompts = measured.answers.iter().map(|(prompt, _)| prompt).sum();
    put(&mut figures, "prompt_tokens_per_second", Some(per_second(prompts)));
    let tokens = answers.iter().map(|answer| answer.tokens.len()).sum();
    put(&mut figures, "generated_tokens_per_second", Some(per_second(tokens)));
    let ttft = answers.iter().filter_map(|answer| answer.time_to_first_token()).collect();
    put(&mut figures, "ttft_seconds", Percentiles::of(ttft));
    let itl = answers.iter().flat_map(|answer| answer.inter_token_latencies()).collect();
    put(&mut figures, "itl_seconds", Percentiles::of(itl));
    let errors = measured.errors.iter().map(|(status, &count)| {
        let sentence = measured.sentences.get(status);
        (status.clone(), json!({"count": count, "first": sentence}))
    });
    put(&mut figures, "errors", Some(errors.collect::<Map<_, _>>()));
    figures
}

/// Whether an answer kept both promises, as far as there are any.
fn is_good(args: &BenchArgs, answer: &Answer) -> bool {
    let first =
        args.slo_ttft.is_none_or(|slo| answer.time_to_first_token().is_some_and(|time| time <= slo.as_secs_f64()));
    let later =
        args.slo_itl.is_none_or(|slo| answer.mean_inter_token_latency().is_none_or(|time| time <= slo.as_secs_f64()));
    first && later
}

fn put(figures: &mut Figures, name: &str, value: Option<impl serde::Serialize>) {
    figures.insert(name.to_owned(), value.map_or(Value::Null, |value| serde_json::to_value(value).unwrap_or_default()));
}

/// The median, and the spread of several.
fn rate(figures: &mut Figures, name: &str, values: Vec<f64>) {
    let several = values.len() > 1;
    let spread = Spread::of(values);
    put(figures, name, spread.map(|spread| spread.median));
    if several {
        put(figures, &format!("{name}_spread"), spread);
    }
}

/// Writes figures to standard output: those of one point as an object or as lines, those of several as an array or as a
/// table. A reader that is gone has had enough of them.
pub(super) fn print(points: &[Figures], as_json: bool) -> std::io::Result<()> {
    let written = match points {
        [figures] if as_json => writeln!(stdout(), "{:#}", Value::Object(figures.clone())),
        [figures] => lines(figures),
        _ if as_json => writeln!(stdout(), "{:#}", Value::Array(points.iter().cloned().map(Value::Object).collect())),
        _ => write!(stdout(), "{}", table(points)),
    };
    match written {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

fn lines(figures: &Figures) -> std::io::Result<()> {
    let width = figures.keys().map(String::len).max().unwrap_or_default();
    let mut out = stdout().lock();
    for (name, value) in figures {
        writeln!(out, "{name:width$}  {}", plain(value))?;
    }
    Ok(())
}

/// The columns of a table: a heading, where its figure is, and the factor that makes its unit of it.
const COLUMNS: [(&str, &str, f64); 9] = [
    ("prompt", "/prompt", 1.0),
    ("concurrency", "/concurrency", 1.0),
    ("prefill tok/s", "/prefill_tokens_per_second", 1.0),
    ("decode tok/s", "/decode_tokens_per_second", 1.0),
    ("tok/s in all", "/generated_tokens_per_second", 1.0),
    ("TTFT p50 ms", "/ttft_seconds/p50", 1e3),
    ("TTFT p99 ms", "/ttft_seconds/p99", 1e3),
    ("ITL p50 ms", "/itl_seconds/p50", 1e3),
    ("ITL p99 ms", "/itl_seconds/p99", 1e3),
];

/// A line for each point, in Markdown.
fn table(points: &[Figures]) -> String {
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let mut table = line(COLUMNS.iter().map(|(heading, ..)| (*heading).to_owned()).collect());
    table.push_str(&format!("|{}\n", "---:|".repeat(COLUMNS.len())));
    for figures in points {
        let figures = Value::Object(figures.clone());
        let cell = |(_, path, factor): &(&str, &str, f64)| match figures.pointer(path) {
            Some(Value::Number(number)) if number.is_f64() => significant(number.as_f64().unwrap_or_default() * factor),
            other => plain(other.unwrap_or(&Value::Null)),
        };
        table.push_str(&line(COLUMNS.iter().map(cell).collect()));
    }
    table
}

/// A figure as people read it.
fn plain(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Number(number) if number.is_f64() => significant(number.as_f64().unwrap_or_default()),
        Value::Object(parts) => {
            let parts = parts.iter().map(|(name, value)| format!("{name} {}", plain(value)));
            parts.collect::<Vec<_>>().join(", ")
        }
        other => other.to_string(),
    }
}

/// Four digits that matter.
fn significant(number: f64) -> String {
    let digits = if number == 0.0 { 1 } else { number.abs().log10().floor() as i32 + 1 };
    format!("{number:.*}", usize::try_from(4 - digits).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_shown_with_the_digits_that_matter() {
        for (number, shown) in [(0.001_234_56, "0.001235"), (12.345_6, "12.35"), (98_765.4, "98765"), (0.0, "0.000")] {
            assert_eq!(significant(number), shown);
        }
        assert_eq!(plain(&json!({"p50": 0.5, "p99": Value::Null})), "p50 0.5000, p99 -");
    }
}
