//! Starting, ending, freezing and reaping the components.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitOptions, kill_process};

use crate::control::{ComponentStatus, Ending, State};
use crate::plan::{Component, PATH, Process, STATE};

/// A component that ran at least this long before it ended is started again at once.
const SETTLED: Duration = Duration::from_secs(10);
/// Pause before the next start of one that ended early.
const RESTART_PAUSE: Duration = Duration::from_millis(500);

/// Owner of the component processes. Process 1 also inherits every orphan of its namespace (the containers' shims)
/// and reaps those too.
pub(super) struct Supervisor {
    shared: Arc<Shared>,
}

struct Shared {
    /// Held while a process is being started and while one is being reaped: starting a process waits by itself for
    /// a child whose program could not be executed, and that must not be reaped by us.
    slots: Mutex<BTreeMap<Component, Slot>>,
    changed: Condvar,
}

struct Slot {
    process: Process,
    extra_args: Vec<String>,
    /// Whether it is to be started again when it ends.
    wanted: bool,
    life: Life,
    restarts: u32,
    last_end: Option<String>,
}

enum Life {
    Down,
    Running { pid: Pid, since: Instant, paused: bool },
    Restarting { due: Instant },
}

impl Supervisor {
    /// Takes charge of `processes`; none is started yet.
    pub(super) fn start(processes: Vec<Process>) -> Self {
        let slot = |process| Slot {
            process,
            extra_args: Vec::new(),
            wanted: false,
            life: Life::Down,
            restarts: 0,
            last_end: None,
        };
        let slots = processes.into_iter().map(|process| (process.component, slot(process))).collect();
        let shared = Arc::new(Shared { slots: Mutex::new(slots), changed: Condvar::new() });
        for work in [Shared::reap, Shared::restart] {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || work(&shared));
        }
        Self { shared }
    }

    pub(super) fn status(&self) -> Vec<ComponentStatus> {
        let slots = self.shared.lock();
        let status = |(&component, slot): (&Component, &Slot)| ComponentStatus {
            component,
            state: match slot.life {
                Life::Down => State::Down,
                Life::Running { paused: false, .. } => State::Running,
                Life::Running { paused: true, .. } => State::Paused,
                Life::Restarting { .. } => State::Restarting,
            },
            extra_args: slot.extra_args.clone(),
            restarts: slot.restarts,
            last_end: slot.last_end.clone(),
        };
        slots.iter().map(status).collect()
    }

    pub(super) fn start_component(&self, component: Component, extra_args: Vec<String>) -> Result<()> {
        let mut slots = self.shared.lock();
        let slot = find(&mut slots, component)?;
        if matches!(slot.life, Life::Running { .. }) {
            return Ok(());
        }
        slot.extra_args = extra_args;
        slot.wanted = true;
        slot.life = spawn(&slot.process, &slot.extra_args)?;
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Ends the component and waits until it is gone: at once for a kill, within two seconds else.
    pub(super) fn stop(&self, component: Component, by: Ending) -> Result<()> {
        let mut slots = self.shared.lock();
        let slot = find(&mut slots, component)?;
        slot.wanted = false;
        let Life::Running { pid, paused, .. } = slot.life else {
            slot.life = Life::Down;
            return Ok(());
        };
        if by == Ending::Asked {
            signal(pid, Signal::TERM)?;
            if paused {
                signal(pid, Signal::CONT)?;
            }
            slots = self.shared.wait_for_end(slots, component, pid, Duration::from_secs(2));
        }
        if find(&mut slots, component)?.pid() == Some(pid) {
            signal(pid, Signal::KILL)?;
            slots = self.shared.wait_for_end(slots, component, pid, Duration::from_secs(2));
        }
        if find(&mut slots, component)?.pid() == Some(pid) {
            bail!("{component} (process {pid:?} inside the cluster) does not end, not even by SIGKILL");
        }
        Ok(())
    }

    pub(super) fn pause(&self, component: Component) -> Result<()> {
        self.set_paused(component, Signal::STOP, true)
    }

    pub(super) fn resume(&self, component: Component) -> Result<()> {
        self.set_paused(component, Signal::CONT, false)
    }

    fn set_paused(&self, component: Component, by: Signal, to: bool) -> Result<()> {
        let mut slots = self.shared.lock();
        match &mut find(&mut slots, component)?.life {
            Life::Running { pid, paused, .. } => {
                signal(*pid, by)?;
                *paused = to;
                Ok(())
            }
            Life::Down | Life::Restarting { .. } => bail!("{component} is not running"),
        }
    }
}

impl Slot {
    fn pid(&self) -> Option<Pid> {
        match self.life {
            Life::Running { pid, .. } => Some(pid),
            Life::Down | Life::Restarting { .. } => None,
        }
    }

    /// The process is gone: one that nobody asked to end is due for a new start.
    fn ended(&mut self, how: &str) {
        let Life::Running { since, .. } = self.life else { return };
        self.last_end = Some(how.to_owned());
        if !self.wanted {
            self.life = Life::Down;
            return;
        }
        let now = Instant::now();
        let pause = if now.duration_since(since) >= SETTLED { Duration::ZERO } else { RESTART_PAUSE };
        self.restarts += 1;
        self.life = Life::Restarting { due: now + pause };
    }
}

type Slots<'a> = MutexGuard<'a, BTreeMap<Component, Slot>>;

impl Shared {
    fn lock(&self) -> Slots<'_> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for_end<'a>(&'a self, slots: Slots<'a>, component: Component, pid: Pid, at_most: Duration) -> Slots<'a> {
        let lives = |slots: &mut BTreeMap<Component, Slot>| slots.get(&component).and_then(Slot::pid) == Some(pid);
        let waited = self.changed.wait_timeout_while(slots, at_most, lives);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Reaps whatever ends in the namespace, for ever.
    fn reap(&self) {
        loop {
            // Only looks, so that the process stays there until the lock is ours.
            let look = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            let nothing_to_reap = rustix::process::waitid(WaitId::All, look).is_err();
            let mut slots = self.lock();
            if nothing_to_reap {
                // No child at all: sleep until one is started.
                drop(self.changed.wait_timeout(slots, RESTART_PAUSE));
                continue;
            }
            while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
                let ended = slots.values_mut().find(|slot| slot.pid() == Some(pid));
                if let Some(slot) = ended {
                    let end = ExitStatus::from_raw(status.as_raw());
                    slot.ended(&end.to_string());
                }
            }
            self.changed.notify_all();
        }
    }

    /// Starts again what ended by itself, for ever.
    fn restart(&self) {
        let mut slots = self.lock();
        loop {
            let now = Instant::now();
            for slot in slots.values_mut() {
                if matches!(slot.life, Life::Restarting { due } if due <= now) {
                    slot.life = spawn(&slot.process, &slot.extra_args).unwrap_or_else(|error| {
                        slot.last_end = Some(format!("{error:#}"));
                        Life::Restarting { due: now + RESTART_PAUSE }
                    });
                }
            }
            let due = slots.values().filter_map(|slot| match slot.life {
                Life::Restarting { due } => Some(due.saturating_duration_since(now)),
                Life::Down | Life::Running { .. } => None,
            });
            let pause = due.min().unwrap_or(Duration::from_secs(3600));
            slots = self.changed.wait_timeout(slots, pause).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn find(slots: &mut BTreeMap<Component, Slot>, component: Component) -> Result<&mut Slot> {
    slots.get_mut(&component).with_context(|| format!("{component} is not part of this cluster"))
}

fn signal(pid: Pid, signal: Signal) -> Result<()> {
    kill_process(pid, signal).with_context(|| format!("sending {signal:?} to process {pid:?}"))
}

fn spawn(process: &Process, extra_args: &[String]) -> Result<Life> {
    let component = process.component;
    let log = Path::new(STATE).join("log").join(format!("{component}.log"));
    let log = File::options()
        .create(true)
        .append(true)
        .open(&log)
        .with_context(|| format!("opening the log {}", log.display()))?;
    let child = Command::new(process.program())
        .args(&process.args)
        .args(extra_args)
        .env_clear()
        .envs([("PATH", PATH), ("HOME", "/tmp")])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("sharing the log")?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("starting {component}"))?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("a process without an id")?;
    Ok(Life::Running { pid, since: Instant::now(), paused: false })
}
