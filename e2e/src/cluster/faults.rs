//! Breaking the components of a local cluster.

use std::time::Duration;

use anyhow::Result;

use crate::control::{self, ComponentStatus, Ending, Request};
use crate::lifecycle::LocalCluster;
use crate::plan::Component;

/// Kills, freezes and restarts components of a cluster that nobody else uses.
///
/// When this value goes, also by a panic, whatever is down or frozen is started again, and what runs with extra
/// arguments is restarted without them.
pub struct Faults<'a> {
    cluster: &'a LocalCluster,
}

impl<'a> Faults<'a> {
    pub(super) fn new(cluster: &'a LocalCluster) -> Self {
        Self { cluster }
    }

    /// Kills the component (SIGKILL), which then stays down until it is started.
    pub fn kill(&self, component: Component) -> Result<()> {
        self.ask(&Request::Stop { component, by: Ending::Killed })
    }

    /// Ends the component by SIGTERM, and by SIGKILL two seconds later; it stays down until it is started.
    pub fn stop(&self, component: Component) -> Result<()> {
        self.ask(&Request::Stop { component, by: Ending::Asked })
    }

    /// Starts the component if it is down, with these arguments after the usual ones: `--goaway-chance=0.02` for the
    /// API server, say. It may not be ready yet: see [`Faults::wait_until_healthy`].
    pub fn start(&self, component: Component, extra_args: &[&str]) -> Result<()> {
        let extra_args = extra_args.iter().map(|&arg| arg.to_owned()).collect();
        self.ask(&Request::Start { component, extra_args })
    }

    /// Ends the component as [`Faults::stop`] does and starts it again, with these arguments after the usual ones.
    pub fn restart(&self, component: Component, extra_args: &[&str]) -> Result<()> {
        self.stop(component)?;
        self.start(component, extra_args)
    }

    /// Freezes the component (SIGSTOP): connections to it stay open and nobody answers.
    pub fn pause(&self, component: Component) -> Result<()> {
        self.ask(&Request::Pause { component })
    }

    /// Lets a frozen component go on (SIGCONT).
    pub fn resume(&self, component: Component) -> Result<()> {
        self.ask(&Request::Resume { component })
    }

    /// How each component is.
    pub fn status(&self) -> Result<Vec<ComponentStatus>> {
        control::status(&self.cluster.paths().control_socket())
    }

    /// Waits until every component runs, the API server answers, the node is ready and names resolve.
    pub async fn wait_until_healthy(&self, deadline: Duration) -> Result<()> {
        self.cluster.wait_until_healthy(deadline).await
    }

    fn ask(&self, request: &Request) -> Result<()> {
        control::ask(&self.cluster.paths().control_socket(), request).map(drop)
    }
}

impl Drop for Faults<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.cluster.mend() {
            crate::progress::say(&format!("components could not be set right: {error:#}"));
        }
    }
}
