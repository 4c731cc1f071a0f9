//! The cluster's first process: process 1 of its own PID namespace, with mount and network namespaces of its own.
//!
//! It lays out the file system that the components see, brings up the node's network, and then supervises the
//! components at the word of whoever connects to its socket. When it ends, the kernel ends everything in the
//! namespace.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change, mount_move};

use crate::command::{self, run};
use crate::control::{self, Request, Response};
use crate::plan::{COMPONENTS, NODE_BRIDGE, Plan, SERVICES, STATE};
use crate::{sandbox, wait};

mod supervise;

use supervise::Supervisor;

/// Without a first request within this time, whoever started us has died and nothing else would ever end us.
const FIRST_REQUEST_DEADLINE: Duration = Duration::from_secs(60);
/// A request is one short line from a program that has it ready.
const REQUEST_DEADLINE: Duration = Duration::from_secs(5);

/// Becomes the first process of the cluster whose state is in `state`; never returns while the cluster is wanted.
///
/// Must be started as process 1 of a new PID namespace, with a mount namespace (private propagation) and a network
/// namespace of its own and `/proc` mounted for it.
pub fn main(state: &Path, components: &Path) -> Result<()> {
    ensure!(std::process::id() == 1, "`cluster init` is started by `cluster up`, as the first process of a namespace");
    let record = fs::read_to_string(state.join("cluster.json")).context("reading the plan")?;
    let plan: Plan = serde_json::from_str(&record).context("the plan in cluster.json")?;
    sandbox::join_cgroup(plan.cgroup.trim_start_matches('/'))?;
    lay_out_files(state, components).context("laying out the cluster's file system")?;
    bring_up_network(&plan).context("bringing up the node's network")?;
    let supervisor = Supervisor::start(plan.processes());
    serve(&supervisor)
}

/// Puts state and components at fixed paths and hides the host's folders into which components would write.
fn lay_out_files(state: &Path, components: &Path) -> Result<()> {
    let run = state.join("mount");
    fs::create_dir_all(&run).with_context(|| format!("making {}", run.display()))?;
    tmpfs(&run)?;
    for (from, to) in [(state, STATE), (components, COMPONENTS)] {
        let name = to.strip_prefix("/run/").context("fixed paths are below /run")?;
        let target = run.join(name);
        fs::create_dir_all(&target).with_context(|| format!("making {}", target.display()))?;
        mount_bind(from, &target).with_context(|| format!("binding {}", from.display()))?;
    }
    // Moved last, as the state itself may be anywhere below what is hidden here.
    mount_move(&run, "/run").context("moving the new /run into place")?;
    for hidden in ["/tmp", "/var/lib", "/var/log"] {
        tmpfs(Path::new(hidden))?;
    }
    // The kubelet hands mounts on to containers.
    mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC).context("sharing mounts")
}

fn tmpfs(target: &Path) -> Result<()> {
    mount("tmpfs", target, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, Some(c"mode=755"))
        .with_context(|| format!("mounting a tmpfs at {}", target.display()))
}

fn bring_up_network(plan: &Plan) -> Result<()> {
    let address = format!("{}/24", plan.subnet.node());
    for line in [
        "link set lo up".to_owned(),
        format!("link add {NODE_BRIDGE} type bridge"),
        format!("address add {address} dev {NODE_BRIDGE}"),
        format!("link set {NODE_BRIDGE} up"),
        // There is no default route. With this one a Service without endpoints refuses connections as it does
        // elsewhere, and the node itself reaches Services.
        format!("route add {SERVICES} dev {NODE_BRIDGE}"),
    ] {
        run(command::new("ip").args(line.split(' ')))?;
    }
    fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("allowing the node to forward")?;
    let bridged = Path::new("/proc/sys/net/bridge/bridge-nf-call-iptables");
    // Absent where the kernel has no bridge filter: then bridged packets need none.
    if bridged.exists() {
        fs::write(bridged, "1").context("filtering bridged packets")?;
    }
    Ok(())
}

fn serve(supervisor: &Supervisor) -> Result<()> {
    let path = Path::new(STATE).join("run/control.sock");
    let listener = UnixListener::bind(&path).with_context(|| format!("listening at {}", path.display()))?;
    listener.set_nonblocking(true)?;
    let mut connection =
        wait::until_blocking("a first request", FIRST_REQUEST_DEADLINE, || Ok(listener.accept().ok()))?;
    listener.set_nonblocking(false)?;
    loop {
        let (mut stream, _) = connection;
        let answer = || -> Result<()> {
            stream.set_nonblocking(false)?;
            stream.set_read_timeout(Some(REQUEST_DEADLINE))?;
            stream.set_write_timeout(Some(REQUEST_DEADLINE))?;
            let response = handle(supervisor, control::receive(&stream)?)
                .unwrap_or_else(|error| Response::Refused { reason: format!("{error:#}") });
            control::send(&mut stream, &response)
        };
        if let Err(error) = { answer }() {
            // Its sender hung up or sent nonsense; the next one is served all the same.
            eprintln!("a request was not answered: {error:#}");
        }
        connection = listener.accept().context("accepting a connection")?;
    }
}

fn handle(supervisor: &Supervisor, request: Request) -> Result<Response> {
    match request {
        Request::Status => return Ok(Response::Status { components: supervisor.status() }),
        Request::Start { component, extra_args } => supervisor.start_component(component, extra_args)?,
        Request::Stop { component, by } => supervisor.stop(component, by)?,
        Request::Pause { component } => supervisor.pause(component)?,
        Request::Resume { component } => supervisor.resume(component)?,
        Request::Connect { address } => {
            let connected = std::net::TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok();
            return Ok(Response::Connected { connected });
        }
    }
    Ok(Response::Done)
}
