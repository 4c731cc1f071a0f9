//! A worker's metrics page, in Prometheus' text format, to the figures that decisions need. `docs/metrics.md` says what each
//! series means.

use super::policy::Slo;

/// What is read of a page: the names of the series, with the type that documents it.
pub const SERIES: [(&str, &str); 15] = [
    (STARTED, "gauge"),
    (RUNNING, "gauge"),
    (WAITING, "gauge"),
    (KV_USAGE, "gauge"),
    (CACHE, "gauge"),
    (REJECTED, "counter"),
    (FINISHED, "counter"),
    (COMPUTED, "histogram"),
    (GENERATED, "histogram"),
    (STEPS, "counter"),
    (STEP_SECONDS, "counter"),
    (STEP_TOKENS, "counter"),
    (KV_STEPS, "counter"),
    (FIRST_TOKEN, "histogram"),
    (PER_TOKEN, "histogram"),
];
const STARTED: &str = "process_start_time_seconds";
const RUNNING: &str = "vllm:num_requests_running";
const WAITING: &str = "vllm:num_requests_waiting";
const KV_USAGE: &str = "vllm:kv_cache_usage_perc";
const CACHE: &str = "vllm:cache_config_info";
const REJECTED: &str = "vllm:admission_rejections_total";
const FINISHED: &str = "vllm:request_success_total";
const COMPUTED: &str = "vllm:request_prefill_kv_computed_tokens";
const GENERATED: &str = "vllm:request_generation_tokens";
const STEPS: &str = "ernie:steps_total";
const STEP_SECONDS: &str = "ernie:step_seconds_total";
const STEP_TOKENS: &str = "ernie:step_tokens_total";
const KV_STEPS: &str = "ernie:kv_token_steps_total";
const FIRST_TOKEN: &str = "vllm:time_to_first_token_seconds";
const PER_TOKEN: &str = "vllm:request_time_per_output_token_seconds";
/// The label by which a page says whose it is.
const MODEL_NAME: &str = "model_name";
/// Most buckets of a histogram that are read.
const BUCKETS: usize = 128;

/// The figures of one page. Totals count since the start of the process.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Page {
    /// Name under which the worker serves its model.
    pub model: String,
    /// Start of the process, in seconds since the epoch by the worker's own clock: tells processes apart.
    pub started: f64,
    /// Requests that run.
    pub running: f64,
    /// Requests that wait.
    pub waiting: f64,
    /// Share of the key-value cache in use.
    pub kv_usage: f64,
    /// Tokens that fit the key-value cache.
    pub kv_capacity: f64,
    /// Requests refused, in total.
    pub rejected: f64,
    /// Requests that ended, in total.
    pub finished: f64,
    /// Their prompt tokens that were computed, in total.
    pub prompt_tokens: f64,
    /// Their generated tokens, in total.
    pub output_tokens: f64,
    /// Forward passes, in total.
    pub steps: f64,
    /// Seconds in them, in total.
    pub step_seconds: f64,
    /// Prompt tokens in them, in total.
    pub prefill_tokens: f64,
    /// Generated tokens in them, in total.
    pub decode_tokens: f64,
    /// Tokens resident in the cache, summed over them, in total.
    pub kv_token_steps: f64,
    /// Times to the first token.
    pub first_token: Histogram,
    /// Mean times between the tokens of requests.
    pub per_token: Histogram,
}

/// Cumulative counts by upper bound.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    /// Upper bound and the observations up to it, by rising bound; without the infinite one.
    pub buckets: Vec<(f64, f64)>,
    /// All observations.
    pub count: f64,
}

impl Histogram {
    /// Observations above a bound: linear within the bucket that it falls in, as Prometheus reckons quantiles.
    pub fn above(&self, bound: f64) -> f64 {
        let mut low = (0.0, 0.0);
        for &high in &self.buckets {
            if bound < high.0 {
                let share = (bound - low.0) / (high.0 - low.0);
                return (self.count - low.1 - share * (high.1 - low.1)).max(0.0);
            }
            low = high;
        }
        // Beyond the last finite bound nothing tells.
        (self.count - low.1).max(0.0)
    }
}

impl Page {
    /// Every total, in one order: none of them falls while a process lives.
    pub fn totals(&self) -> [f64; 11] {
        [
            self.rejected,
            self.finished,
            self.prompt_tokens,
            self.output_tokens,
            self.steps,
            self.step_seconds,
            self.prefill_tokens,
            self.decode_tokens,
            self.kv_token_steps,
            self.first_token.count,
            self.per_token.count,
        ]
    }

    /// First tokens and answers that broke the objective, in total.
    pub fn late(&self, slo: &Slo) -> f64 {
        self.first_token.above(slo.ttft) + self.per_token.above(slo.itl)
    }
}

/// Why a page says nothing.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Malformed {
    /// Not text.
    #[error("the page is not UTF-8")]
    NotText,
    /// A line that is no sample.
    #[error("line {0} is not of the form NAME{{LABELS}} VALUE")]
    Line(usize),
    /// A number that no worker counts.
    #[error("{series} is {value}: a finite number of 0 or more was expected")]
    Value {
        /// Which series.
        series: &'static str,
        /// What was there.
        value: String,
    },
    /// A series is not there.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// More buckets than any worker has, or in disorder.
    #[error("the buckets of {0} are too many or not in order")]
    Buckets(&'static str),
}

/// Reads a page.
///
/// # Errors
///
/// The first thing that no worker writes. A page is believed as a whole or not at all.
pub fn parse(page: &[u8]) -> Result<Page, Malformed> {
    let text = std::str::from_utf8(page).map_err(|_| Malformed::NotText)?;
    let mut read = Page::default();
    let mut seen = [false; SERIES.len()];
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let end = line.find(|c: char| c == '{' || c.is_ascii_whitespace()).ok_or(Malformed::Line(index + 1))?;
        let Some((position, part)) = wanted(&line[..end]) else { continue };
        let (labels, rest) = labels(&line[end..]).ok_or(Malformed::Line(index + 1))?;
        let series = SERIES[position].0;
        let number = rest.split_ascii_whitespace().next().ok_or(Malformed::Line(index + 1))?;
        let value = number.parse::<f64>().ok().filter(|value| value.is_finite() && *value >= 0.0);
        let value = value.ok_or_else(|| Malformed::Value { series, value: shortened(number) })?;
        seen[position] = true;
        read.take(series, part, &labels, value)?;
    }
    match seen.iter().position(|seen| !seen) {
        Some(missing) => Err(Malformed::Missing(SERIES[missing].0)),
        None => Ok(read),
    }
}

/// Part of a histogram, or a plain series.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Part {
    Plain,
    Bucket,
    Sum,
    Count,
}

/// Which of the wanted series a name is, and which part of it.
fn wanted(name: &str) -> Option<(usize, Part)> {
    SERIES.iter().enumerate().find_map(|(position, (series, kind))| {
        let part = match (name.strip_prefix(series)?, *kind == "histogram") {
            ("", false) => Part::Plain,
            ("_bucket", true) => Part::Bucket,
            ("_sum", true) => Part::Sum,
            ("_count", true) => Part::Count,
            _ => return None,
        };
        Some((position, part))
    })
}

type Labels = Vec<(String, String)>;

/// The labels at the beginning of a text, if any, and what follows.
fn labels(text: &str) -> Option<(Labels, &str)> {
    let mut labels = Labels::new();
    let Some(mut rest) = text.strip_prefix('{') else { return Some((labels, text)) };
    loop {
        rest = rest.trim_start_matches([',', ' ']);
        if let Some(after) = rest.strip_prefix('}') {
            return Some((labels, after));
        }
        let (name, after) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut characters = after.char_indices();
        let end = loop {
            match characters.next()? {
                (end, '"') => break end,
                (_, '\\') => value.push(match characters.next()?.1 {
                    'n' => '\n',
                    other => other,
                }),
                (_, other) => value.push(other),
            }
        };
        labels.push((name.to_owned(), value));
        rest = &after[end + 1..];
    }
}

fn label<'a>(labels: &'a Labels, name: &str) -> Option<&'a str> {
    labels.iter().find(|(label, _)| label == name).map(|(_, value)| value.as_str())
}

impl Page {
    fn take(&mut self, series: &'static str, part: Part, labels: &Labels, value: f64) -> Result<(), Malformed> {
        match series {
            STARTED => self.started = value,
            RUNNING => {
                self.model = label(labels, MODEL_NAME).unwrap_or_default().to_owned();
                self.running = value;
            }
            WAITING => self.waiting = value,
            KV_USAGE => self.kv_usage = value.min(1.0),
            CACHE => {
                let size = |name: &str| label(labels, name)?.parse::<u32>().ok().map(f64::from);
                let sizes = size("block_size").zip(size("num_gpu_blocks"));
                let (block, blocks) = sizes.ok_or(Malformed::Missing(CACHE))?;
                self.kv_capacity = block * blocks;
            }
            REJECTED => self.rejected += value,
            FINISHED => self.finished += value,
            STEPS => self.steps = value,
            STEP_SECONDS => self.step_seconds += value,
            STEP_TOKENS => match label(labels, "kind") {
                Some("prefill") => self.prefill_tokens = value,
                Some("decode") => self.decode_tokens = value,
                _ => {}
            },
            KV_STEPS => self.kv_token_steps = value,
            COMPUTED if part == Part::Sum => self.prompt_tokens = value,
            GENERATED if part == Part::Sum => self.output_tokens = value,
            FIRST_TOKEN => self.first_token.take(series, part, labels, value)?,
            PER_TOKEN => self.per_token.take(series, part, labels, value)?,
            _ => {}
        }
        Ok(())
    }
}

impl Histogram {
    fn take(&mut self, series: &'static str, part: Part, labels: &Labels, value: f64) -> Result<(), Malformed> {
        match part {
            Part::Count => self.count = value,
            Part::Bucket => {
                let bound = label(labels, "le").and_then(|le| le.parse::<f64>().ok());
                let bound = bound.filter(|bound| *bound > 0.0).ok_or(Malformed::Buckets(series))?;
                if bound.is_infinite() {
                    return Ok(());
                }
                let disorder = self.buckets.last().is_some_and(|last| last.0 >= bound || last.1 > value);
                if disorder || self.buckets.len() >= BUCKETS {
                    return Err(Malformed::Buckets(series));
                }
                self.buckets.push((bound, value));
            }
            Part::Sum | Part::Plain => {}
        }
        Ok(())
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(32).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A page as a worker writes it.
    pub(in crate::scale) fn page(started: f64, requests: f64) -> String {
        let model = "engine=\"0\",model_name=\"m\"";
        let histogram = |name: &str, sum: f64| {
            format!(
                "{name}_bucket{{{model},le=\"0.1\"}} {}\n{name}_bucket{{{model},le=\"1\"}} {requests}\n\
                 {name}_bucket{{{model},le=\"+Inf\"}} {requests}\n{name}_sum{{{model}}} {sum}\n\
                 {name}_count{{{model}}} {requests}\n",
                requests / 2.0
            )
        };
        [
            format!("# HELP {STARTED} Start.\n# TYPE {STARTED} gauge\n{STARTED} {started}\n"),
            format!("{RUNNING}{{{model}}} 2\n{WAITING}{{{model}}} 1\n{KV_USAGE}{{{model}}} 0.25\n"),
            format!("{CACHE}{{block_size=\"16\",{model},num_gpu_blocks=\"100\"}} 1\n"),
            format!("{REJECTED}{{{model},reason=\"max_num_queued_reqs\"}} 3\n"),
            format!("{FINISHED}{{{model},finished_reason=\"stop\"}} {requests}\n"),
            format!("{FINISHED}{{{model},finished_reason=\"abort\"}} 1\n"),
            histogram(COMPUTED, 50.0 * requests),
            histogram(GENERATED, 10.0 * requests),
            format!("{STEPS}{{{model}}} {}\n", 10.0 * requests),
            format!("{STEP_SECONDS}{{{model},part=\"forward\"}} {requests}\n"),
            format!("{STEP_SECONDS}{{{model},part=\"overhead\"}} 0.5\n"),
            format!("{STEP_TOKENS}{{kind=\"prefill\",{model}}} {}\n", 50.0 * requests),
            format!("{STEP_TOKENS}{{kind=\"decode\",{model}}} {}\n", 10.0 * requests),
            format!("{KV_STEPS}{{{model}}} {}\n", 500.0 * requests),
            histogram(FIRST_TOKEN, requests),
            histogram(PER_TOKEN, requests),
            "ernie:grpc_connections 7\nsomething_else{a=\"\\\"}\"} NaN\n".to_owned(),
        ]
        .concat()
    }

    #[test]
    fn a_page_of_a_worker_is_read() {
        let read = parse(page(1000.0, 20.0).as_bytes()).expect("well formed");
        assert_eq!((read.model.as_str(), read.started, read.running, read.waiting), ("m", 1000.0, 2.0, 1.0));
        assert_eq!((read.kv_usage, read.kv_capacity, read.rejected, read.finished), (0.25, 1600.0, 3.0, 21.0));
        assert_eq!((read.prompt_tokens, read.output_tokens, read.steps), (1000.0, 200.0, 200.0));
        assert_eq!((read.step_seconds, read.prefill_tokens, read.decode_tokens), (20.5, 1000.0, 200.0));
        assert_eq!((read.kv_token_steps, read.first_token.count, read.per_token.buckets.len()), (10_000.0, 20.0, 2));
    }

    #[test]
    fn what_no_worker_writes_is_refused_with_the_series_and_the_value() {
        let good = page(1000.0, 20.0);
        for (from, to, expected) in [
            ("vllm:num_requests_running{engine=\"0\",model_name=\"m\"} 2", "vllm:num_requests_running NaN", "NaN"),
            ("vllm:num_requests_waiting{engine=\"0\",model_name=\"m\"} 1", "vllm:num_requests_waiting -1", "-1"),
            ("ernie:steps_total{engine=\"0\",model_name=\"m\"} 200", "ernie:steps_total +Inf", "+Inf"),
            ("ernie:steps_total{engine=\"0\",model_name=\"m\"} 200", "ernie:steps_total 1e999", "1e999"),
            ("ernie:steps_total{engine=\"0\",model_name=\"m\"} 200\n", "", "ernie:steps_total is missing"),
            ("num_gpu_blocks=\"100\"", "num_gpu_blocks=\"many\"", "vllm:cache_config_info is missing"),
            ("le=\"0.1\"", "le=\"7\"", "not in order"),
            ("ernie:steps_total{engine=\"0\",model_name=\"m\"}", "ernie:steps_total{engine=\"0", "is not of the form"),
        ] {
            assert!(good.contains(from), "{from}");
            let error = parse(good.replace(from, to).as_bytes()).expect_err(to).to_string();
            assert!(error.contains(expected), "{to}: {error}");
        }
        assert_eq!(parse(b""), Err(Malformed::Missing(STARTED)));
        assert_eq!(parse(&[0xff, 0xfe, b'\n']), Err(Malformed::NotText));
        assert!(parse(b"<html>not found</html>").is_err());
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let good = page(1000.0, 20.0).into_bytes();
        for cut in 0..good.len() {
            let _ = parse(&good[..cut]);
            let mut bent = good.clone();
            bent[cut] = bent[cut].wrapping_add(13);
            let _ = parse(&bent);
        }
    }

    #[test]
    fn observations_above_a_bound_are_linear_within_a_bucket() {
        let histogram = Histogram { buckets: vec![(1.0, 10.0), (2.0, 30.0)], count: 32.0 };
        for (bound, above) in [(0.5, 27.0), (1.0, 22.0), (1.5, 12.0), (2.0, 2.0), (9.0, 2.0)] {
            assert!((histogram.above(bound) - above).abs() < 1e-9, "{bound}: {}", histogram.above(bound));
        }
    }

    #[test]
    fn every_series_is_documented_with_its_type() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
        let document = std::fs::read_to_string(path).expect("docs/metrics.md");
        for (series, kind) in SERIES {
            assert!(document.contains(&format!("| `{series}` | {kind} |")), "{series} as a {kind}");
        }
        for (series, label) in [
            (CACHE, "`num_gpu_blocks`"),
            (CACHE, "`block_size`"),
            (STEP_TOKENS, "`prefill`"),
            (STEP_TOKENS, "`decode`"),
            (STEP_TOKENS, "`kind`"),
        ] {
            let row = document.lines().find(|line| line.starts_with(&format!("| `{series}`"))).expect(series);
            assert!(row.contains(label), "{series} has {label}");
        }
        assert!(document.contains("`model_name`"));
    }
}
