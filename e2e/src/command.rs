//! Running other programs, with what they said in the error when they fail.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::wait;

/// A command without standard input that finds Debian's administration programs also when the user's PATH lacks them.
pub(crate) fn new(program: impl AsRef<OsStr>) -> Command {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/local/sbin:/usr/sbin:/sbin");
    let mut command = Command::new(program);
    command.env("PATH", path).stdin(Stdio::null());
    command
}

/// Runs `command` to its end and returns its standard output; an exit status other than 0 is an error that carries
/// what it wrote.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let line = describe(command);
    let output = command.output().with_context(|| format!("starting `{line}`"))?;
    succeeded(&line, &output)
}

/// As [`run`], with `input` as standard input and an end by SIGKILL when it takes longer than `deadline`.
pub(crate) fn run_within(command: &mut Command, input: Vec<u8>, deadline: Duration) -> Result<String> {
    let line = describe(command);
    let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = pipes.spawn().with_context(|| format!("starting `{line}`"))?;
    // Threads, so that neither side waits for the other with a full pipe.
    let stdin = child.stdin.take();
    std::thread::spawn(move || stdin.map(|mut pipe| pipe.write_all(&input)));
    let (stdout, stderr) = (collect(child.stdout.take()), collect(child.stderr.take()));
    let ended = wait::until_blocking(&format!("`{line}` to end"), deadline, || Ok(child.try_wait()?));
    if ended.is_err() {
        child.kill().with_context(|| format!("ending `{line}`"))?;
        child.wait().with_context(|| format!("waiting for `{line}`"))?;
    }
    let written = |reader: JoinHandle<Vec<u8>>| reader.join().unwrap_or_default();
    let output = Output { status: ExitStatus::default(), stdout: written(stdout), stderr: written(stderr) };
    match ended {
        Ok(status) => succeeded(&line, &Output { status, ..output }),
        Err(error) => Err(error.context(said(&output))),
    }
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read before a failure is still worth showing.
        let _ = pipe.map(|mut pipe| pipe.read_to_end(&mut bytes));
        bytes
    })
}

fn succeeded(line: &str, output: &Output) -> Result<String> {
    if !output.status.success() {
        bail!("`{line}` failed ({}):\n{}", output.status, said(output));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn said(output: &Output) -> String {
    let texts = [&output.stderr, &output.stdout].map(|bytes| String::from_utf8_lossy(bytes).trim().to_owned());
    texts.join("\n").trim().to_owned()
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_command_is_shown_with_what_it_said() {
        let error = run(new("sh").args(["-c", "echo broken >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("broken") && error.contains("exit status: 3"), "{error}");
    }

    #[test]
    fn a_command_that_hangs_is_ended_and_shown_with_what_it_said_until_then() {
        let mut hang = new("sh");
        hang.args(["-c", "echo started; exec sleep 600"]);
        let error = run_within(&mut hang, Vec::new(), Duration::from_millis(300)).unwrap_err();
        assert!(format!("{error:#}").contains("started"), "{error:#}");
    }

    #[test]
    fn input_larger_than_a_pipe_goes_through() {
        let input = vec![b'x'; 1 << 20];
        let output = run_within(&mut new("cat"), input, Duration::from_secs(60)).unwrap();
        assert_eq!(output.len(), 1 << 20);
    }
}
