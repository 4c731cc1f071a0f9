//! What is said between the cluster's first process and whoever drives it: one JSON line each way, a connection a
//! request, over a Unix socket in the state folder.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use crate::plan::Component;

/// Longest that an answer may take; each request is a matter of milliseconds.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "do")]
pub(crate) enum Request {
    /// How each component is.
    Status,
    /// Starts a component that is down, with arguments beyond the planned ones; one that runs is left alone.
    Start { component: Component, extra_args: Vec<String> },
    /// Ends a component and keeps it down until `Start`.
    Stop { component: Component, by: Ending },
    /// Freezes a component.
    Pause { component: Component },
    /// Lets a frozen component go on.
    Resume { component: Component },
    /// Whether something accepts connections at an address inside the cluster.
    Connect { address: SocketAddr },
}

/// How a component is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Ending {
    /// SIGTERM: it may finish what it does.
    Asked,
    /// SIGKILL: as in a crash.
    Killed,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "is")]
pub(crate) enum Response {
    Done,
    Status { components: Vec<ComponentStatus> },
    Connected { connected: bool },
    Refused { reason: String },
}

/// How one component is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComponentStatus {
    /// Which one.
    pub component: Component,
    /// What it does now.
    pub state: State,
    /// Arguments that it was started with beyond the usual ones.
    pub extra_args: Vec<String>,
    /// Starts after it ended without being asked to.
    pub restarts: u32,
    /// How it ended last, such as `exit status: 1`, if it ever did.
    pub last_end: Option<String>,
}

/// What a component does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It runs.
    Running,
    /// It is frozen by SIGSTOP.
    Paused,
    /// It is down until somebody starts it.
    Down,
    /// It ended by itself and is about to be started again.
    Restarting,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Down => "down",
            Self::Restarting => "restarting",
        })
    }
}

/// Sends `request` to the first process that listens at `socket`.
pub(crate) fn ask(socket: &Path, request: &Request) -> Result<Response> {
    let mut stream = UnixStream::connect(socket).with_context(|| format!("connecting to {}", socket.display()))?;
    stream.set_read_timeout(Some(ANSWER_DEADLINE))?;
    stream.set_write_timeout(Some(ANSWER_DEADLINE))?;
    send(&mut stream, request)?;
    match receive(&stream)? {
        Response::Refused { reason } => Err(anyhow!(reason)),
        response => Ok(response),
    }
}

/// How all components are.
pub(crate) fn status(socket: &Path) -> Result<Vec<ComponentStatus>> {
    match ask(socket, &Request::Status)? {
        Response::Status { components } => Ok(components),
        other => bail!("asked for the status and got {other:?}"),
    }
}

pub(crate) fn send(stream: &mut UnixStream, message: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_string(message).context("encoding a message")?;
    line.push('\n');
    stream.write_all(line.as_bytes()).context("sending a message")
}

pub(crate) fn receive<M: serde::de::DeserializeOwned>(stream: &UnixStream) -> Result<M> {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).context("waiting for a message")?;
    serde_json::from_str(&line).with_context(|| format!("not a message: {line:?}"))
}
