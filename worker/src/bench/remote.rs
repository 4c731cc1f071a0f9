//! A server measured from outside, by requests that come when they come, whether it keeps up or not.

use std::collections::BTreeMap;
use std::time::Duration;

use ernie_proto::client::never_sent;
use ernie_proto::ernie::v1::complete_request::Prompt;
use ernie_proto::ernie::v1::generate_response::Event;
use ernie_proto::ernie::v1::inference_client::InferenceClient;
use ernie_proto::ernie::v1::{CompleteRequest, GetModelRequest, SamplingParams, TokenIds};
use ernie_workload::{Chance, Lengths, Request, renewal, trace};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::BenchArgs;
use super::figures::Answer;
use crate::ask;

/// A request may take so long.
const DEADLINE: Duration = Duration::from_secs(600);
/// Times that a call is sent again that left with an old connection.
const ATTEMPTS: usize = 5;
/// Requests in flight; further ones are counted as not sent.
const IN_FLIGHT: usize = 4096;

/// What was measured.
#[derive(Debug, Default)]
pub(super) struct Measured {
    /// Complete answers, with their prompts' lengths.
    pub(super) answers: Vec<(usize, Answer)>,
    /// How the others ended, by status.
    pub(super) errors: BTreeMap<String, usize>,
    /// A sentence of each status.
    pub(super) sentences: BTreeMap<String, String>,
    /// From the first request's moment to the last answer.
    pub(super) seconds: f64,
}

/// Sends what the arguments say, and waits for every answer.
pub(super) async fn run(args: &BenchArgs, server: &str) -> Result<Measured, String> {
    let channel = ask::connect(server).await.map_err(|error| error.to_string())?;
    let mut client = InferenceClient::new(channel).max_decoding_message_size(16 << 20);
    let model = client.get_model(GetModelRequest::default()).await.map_err(|status| sentence(&status))?.into_inner();
    let (vocab, context) = (model.vocab_size as usize, model.max_model_len);
    let requests = requests(args)?;
    let begin = Instant::now();
    let (mut running, mut measured) = (JoinSet::new(), Measured::default());
    for (number, request) in requests.into_iter().enumerate() {
        tokio::time::sleep_until(begin + Duration::from_secs_f64(request.at)).await;
        while let Some(ended) = running.try_join_next() {
            measured.note(ended);
        }
        if running.len() >= IN_FLIGHT {
            measured.fail("NOT_SENT", format!("{IN_FLIGHT} requests were in flight"));
            continue;
        }
        if request.prompt + request.output > context {
            let length = request.prompt + request.output;
            measured.fail("NOT_SENT", format!("a request of {length} tokens exceeds the context of {context}"));
            continue;
        }
        let mut chance = Chance::new(args.seed, number as u64);
        let ids = (0..request.prompt).map(|_| chance.below(vocab) as u32).collect();
        running.spawn(answer(client.clone(), ids, request.output, begin, request.at));
    }
    while let Some(ended) = running.join_next().await {
        measured.note(ended);
    }
    measured.seconds = begin.elapsed().as_secs_f64();
    Ok(measured)
}

/// What comes when: a Poisson process, or a trace as long as it goes.
fn requests(args: &BenchArgs) -> Result<Vec<Request>, String> {
    let seconds = args.duration.as_secs_f64();
    let mut requests = match (&args.trace, args.rate) {
        (Some(file), _) => {
            let text = std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
            trace::parse(&text, false).map_err(|error| format!("{}: {error}", file.display()))?
        }
        (None, Some(rate)) => {
            let [prompt] = args.prompt[..] else { return Err("--grpc takes one --prompt".to_owned()) };
            let lengths = Lengths::Fixed(narrow(prompt), narrow(args.generate));
            renewal(|_| rate, seconds, 1.0, lengths, &mut Chance::new(args.seed, u64::MAX))
        }
        (None, None) => return Err("--grpc needs --rate or --trace".to_owned()),
    };
    requests.retain(|request| request.at < seconds);
    Ok(requests)
}

fn narrow(tokens: usize) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

async fn answer(
    mut client: InferenceClient<Channel>,
    ids: Vec<u32>,
    output: u32,
    begin: Instant,
    asked: f64,
) -> Result<(usize, Answer), Status> {
    let length = ids.len();
    let sampling = SamplingParams { max_tokens: Some(output), ignore_eos: true, ..SamplingParams::default() };
    let prompt = Some(Prompt::Tokens(TokenIds { ids }));
    let question = CompleteRequest { prompt, sampling: Some(sampling), ..CompleteRequest::default() };
    let request = || {
        let mut request = tonic::Request::new(question.clone());
        request.set_timeout(DEADLINE);
        request
    };
    let mut answer = Answer { asked, tokens: Vec::new() };
    let mut accepted = client.complete(request()).await;
    for _ in 0..ATTEMPTS {
        match &accepted {
            Err(status) if never_sent(status) => accepted = client.complete(request()).await,
            _ => break,
        }
    }
    let mut stream = accepted?.into_inner();
    let mut done = false;
    while let Some(message) = stream.message().await? {
        let now = begin.elapsed().as_secs_f64();
        match message.event {
            Some(Event::Delta(delta)) => answer.tokens.extend(delta.token_ids.iter().map(|_| now)),
            Some(Event::Done(_)) => done = true,
            _ => {}
        }
    }
    if done { Ok((length, answer)) } else { Err(Status::internal("the stream ended without `done`")) }
}

impl Measured {
    fn note(&mut self, ended: Result<Result<(usize, Answer), Status>, tokio::task::JoinError>) {
        match ended {
            Ok(Ok(answer)) => self.answers.push(answer),
            Ok(Err(status)) => self.fail(name(status.code()), status.message().to_owned()),
            Err(error) => self.fail("CLIENT", error.to_string()),
        }
    }

    fn fail(&mut self, status: &str, sentence: String) {
        *self.errors.entry(status.to_owned()).or_default() += 1;
        self.sentences.entry(status.to_owned()).or_insert(sentence);
    }
}

fn name(code: Code) -> &'static str {
    ask::code_name(code)
}

fn sentence(status: &Status) -> String {
    format!("{}: {}", name(status.code()), status.message())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};

    fn args(more: &[&str]) -> BenchArgs {
        let line = ["ernie-worker", "bench", "--grpc", "localhost:1"].iter().chain(more);
        match Cli::parse_line(line.map(Into::into)).expect("parses").command {
            Command::Bench(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_rate_makes_as_many_requests_of_the_lengths_asked_for() {
        let args = args(&["--rate", "50", "--duration", "60s", "--prompt", "7", "--generate", "3"]);
        let requests = requests(&args).expect("made");
        assert!((2700..3300).contains(&requests.len()), "{}", requests.len());
        assert!(requests.iter().all(|request| (request.prompt, request.output) == (7, 3) && request.at < 60.0));
        assert_eq!(requests, super::requests(&args).expect("made"), "the same seed gives the same requests");
    }

    #[test]
    fn a_trace_is_cut_at_the_duration() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("trace.jsonl");
        let lines =
            [0, 500, 1500].map(|at| format!("{{\"timestamp\": {at}, \"input_length\": 9, \"output_length\": 2}}"));
        std::fs::write(&file, lines.join("\n")).expect("written");
        let path = file.to_str().expect("text");
        assert_eq!(requests(&args(&["--trace", path, "--duration", "1s"])).expect("read").len(), 2);
        let error = requests(&args(&["--trace", "nowhere"])).expect_err("missing");
        assert!(error.contains("nowhere"), "{error}");
    }
}
