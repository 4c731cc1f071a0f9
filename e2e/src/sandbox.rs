//! The box that a whole cluster lives in: its own PID, mount and network namespaces.
//!
//! The box is recognised by the command line of its first process, which names the state folder. So there is no
//! process id on disk that could be stale, and the remains of a run that was killed at any moment are always found.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::cache::ClusterPaths;
use crate::command::{self, run};
use crate::components::Components;
use crate::control::{self, Request, Response};
use crate::plan::{NODE_BRIDGE, Subnet, UPLINK};
use crate::wait;

/// The hidden subcommand by which the program becomes a box's first process.
pub(crate) const INIT: &str = "init";
/// Where the kernel's control groups are.
const CGROUPS: &str = "/sys/fs/cgroup";
/// The kernel needs a moment to tear down namespaces, more when the machine is busy.
const TEARDOWN_DEADLINE: Duration = Duration::from_secs(30);

/// How long the programs that started the first process get to notice its end.
const PATIENCE: Duration = Duration::from_secs(2);
/// The control group of the components, beside those of the pods.
const NODE_GROUP: &str = "node";

/// Starts the first process of the cluster, detached from this one, and waits until it takes requests.
pub(crate) fn launch(paths: &ClusterPaths, components: &Components, program: &Path) -> Result<()> {
    let log = paths.log(INIT);
    let log = fs::File::create(&log).with_context(|| format!("creating {}", log.display()))?;
    let status = Command::new("setsid")
        .arg("--fork")
        .args(["unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "--mount-proc"])
        .args(["--propagation", "private", "--"])
        .arg(program)
        .args([INIT, "--state"])
        .arg(paths.state())
        .arg("--components")
        .arg(components.folder())
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("sharing the log")?)
        .stderr(log)
        .status()
        .context("starting `setsid` (package util-linux)")?;
    ensure!(status.success(), "`setsid` failed ({status})");
    let socket = paths.control_socket();
    wait::until_blocking("the cluster's first process to answer", Duration::from_secs(10), || {
        match control::status(&socket) {
            Ok(_) => Ok(Some(())),
            Err(error) if members(paths).is_empty() && !socket.exists() => {
                // It may not have been started yet; a log says that it was, and that it gave up.
                let said = fs::read_to_string(paths.log(INIT)).unwrap_or_default();
                if said.is_empty() { Ok(None) } else { Err(error.context(format!("the first process said: {said}"))) }
            }
            Err(_) => Ok(None),
        }
    })
}

/// A process on the host that belongs to the box.
struct Member {
    pid: Pid,
    /// Whether it is process 1 inside.
    first: bool,
}

/// The processes that start or are the box's first one.
fn members(paths: &ClusterPaths) -> Vec<Member> {
    let marks: [&[u8]; 3] = [INIT.as_bytes(), b"--state", paths.state().as_os_str().as_encoded_bytes()];
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw) else {
            continue;
        };
        let command_line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = command_line.split(|&byte| byte == 0).collect();
        if words.windows(marks.len()).any(|window| window == marks) {
            let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
            let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
            let mut ids = ids.split_whitespace();
            let first = ids.next_back() == Some("1") && ids.next().is_some();
            found.push(Member { pid, first });
        }
    }
    found
}

/// The host's id of the box's first process, if the box lives.
pub(crate) fn first_process(paths: &ClusterPaths) -> Option<Pid> {
    members(paths).into_iter().find(|member| member.first).map(|member| member.pid)
}

/// Whether any process of the box lives.
pub(crate) fn lives(paths: &ClusterPaths) -> bool {
    !members(paths).is_empty()
}

/// Connects the box to the host: one link, an address on either end.
pub(crate) fn attach(paths: &ClusterPaths, subnet: Subnet) -> Result<()> {
    let link = paths.kernel_name();
    let first = first_process(paths).context("the cluster's first process has ended")?.as_raw_pid();
    let on_host = |line: String| run(command::new("ip").args(line.split(' ')));
    on_host(format!("link add {link} type veth peer name {UPLINK} netns {first}"))?;
    on_host(format!("address add {}/24 dev {link}", subnet.host()))?;
    on_host(format!("link set {link} up"))?;
    let inside = |line: String| run(command::new("nsenter").args(format!("-t {first} -n ip {line}").split(' ')));
    inside(format!("link set {UPLINK} master {NODE_BRIDGE}"))?;
    inside(format!("link set {UPLINK} up"))?;
    Ok(())
}

/// A command that runs `program` (a path inside the box, such as `/run/components/bin/ctr`) within all of the box's
/// namespaces.
pub(crate) fn enter(paths: &ClusterPaths, program: &str) -> Result<Command> {
    let first = first_process(paths).context("the cluster is not up")?.as_raw_pid();
    let mut command = command::new("nsenter");
    command.args(["-t", &first.to_string(), "-m", "-p", "-n", "--", program]);
    Ok(command)
}

/// Waits until something inside the box accepts connections at `address`.
pub(crate) fn wait_for_port(paths: &ClusterPaths, what: &str, address: SocketAddr, deadline: Duration) -> Result<()> {
    wait::until_blocking(&format!("{what} to accept connections"), deadline, || {
        match control::ask(&paths.control_socket(), &Request::Connect { address })? {
            Response::Connected { connected: true } => Ok(Some(())),
            _ => Ok(None),
        }
    })
}

/// Makes the cgroup below which the cluster's pods live, in every hierarchy.
pub(crate) fn make_cgroups(name: &str) -> Result<()> {
    // Version 2: the kubelet asks that its group has every controller that there is. Systemd has enabled most.
    if let Ok(controllers) = fs::read_to_string(Path::new(CGROUPS).join("cgroup.controllers")) {
        for controller in controllers.split_whitespace() {
            let enable = fs::write(Path::new(CGROUPS).join("cgroup.subtree_control"), format!("+{controller}"));
            enable.with_context(|| format!("enabling the cgroup controller {controller}"))?;
        }
    }
    for hierarchy in hierarchies() {
        let group = hierarchy.join(name);
        if group.exists() {
            continue;
        }
        fs::create_dir(&group).with_context(|| format!("making the cgroup {}", group.display()))?;
        // A group of the old cpuset hierarchy takes no process before it has processors and memory.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let (from, to) = (hierarchy.join(file), group.join(file));
            if let (Ok(value), true) = (fs::read_to_string(&from), to.exists()) {
                fs::write(&to, value.trim()).with_context(|| format!("writing {}", to.display()))?;
            }
        }
    }
    Ok(())
}

/// Moves the calling process, and so all that it will start, to the cluster's control group `name`.
///
/// A process that is being killed loses its command line long before its files. The group empties last, so waiting for
/// that is waiting until nothing of the cluster writes any more. One hierarchy is enough; the limits that the
/// components live under stay those of whoever started them.
pub(crate) fn join_cgroup(name: &str) -> Result<()> {
    let all = hierarchies();
    let hierarchy = all.iter().find(|path| path.ends_with("pids")).or(all.first()).context("no cgroups are mounted")?;
    let group = hierarchy.join(name).join(NODE_GROUP);
    fs::create_dir_all(&group).with_context(|| format!("making the cgroup {}", group.display()))?;
    fs::write(group.join("cgroup.procs"), "0").with_context(|| format!("joining the cgroup {}", group.display()))
}

/// The mounted hierarchies: several in version 1, the root itself in version 2.
fn hierarchies() -> Vec<std::path::PathBuf> {
    let root = Path::new(CGROUPS);
    if root.join("cgroup.controllers").exists() {
        return vec![root.to_owned()];
    }
    let mounted = |path: &std::path::PathBuf| path.join("cgroup.procs").exists();
    let is_link = |path: &std::path::PathBuf| path.is_symlink();
    let entries = fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(|path| mounted(path) && !is_link(path)).collect()
}

/// Removes everything of the cluster, whatever state it is in: processes, link, cgroups, files. Does nothing where
/// nothing is left.
pub(crate) fn destroy(paths: &ClusterPaths) -> Result<()> {
    end_processes(paths)?;
    let name = paths.kernel_name();
    wait::until_blocking(&format!("the link {name} to go"), TEARDOWN_DEADLINE, || {
        if !Path::new("/sys/class/net").join(&name).exists() {
            return Ok(Some(()));
        }
        // It goes with the namespace at its other end, which takes a moment: whichever is first.
        let _ = run(command::new("ip").args(["link", "delete", &name]));
        Ok(None)
    })?;
    // The last process leaves these when it can write no more.
    for hierarchy in hierarchies() {
        let group = hierarchy.join(&name);
        wait::until_blocking(&format!("the cgroup {} to empty", group.display()), TEARDOWN_DEADLINE, || {
            Ok(remove_group(&group).then_some(()))
        })?;
    }
    remove_state(paths.state())
}

/// Kills the first process, and with it all others of its namespace.
pub(crate) fn end_processes(paths: &ClusterPaths) -> Result<()> {
    let begin = Instant::now();
    wait::until_blocking("the cluster's processes to end", TEARDOWN_DEADLINE, || {
        let left = members(paths);
        // `unshare` and `setsid` end with what they wait for. One that has been killed on the way there never does.
        let patient = begin.elapsed() < PATIENCE;
        for member in left.iter().filter(|member| member.first || !patient) {
            let _ = kill_process(member.pid, Signal::KILL);
        }
        Ok(left.is_empty().then_some(()))
    })
}

/// Removes a control group with all below it, deepest first; whether nothing is left.
fn remove_group(group: &Path) -> bool {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_group(&entry.path());
        }
    }
    // Refused while a process in it is still ending.
    let _ = fs::remove_dir(group);
    !group.exists()
}

fn remove_state(state: &Path) -> Result<()> {
    if !state.exists() {
        return Ok(());
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("reading the mounts")?;
    let below = mounts.lines().filter_map(|line| line.split(' ').nth(4)).find(|at| Path::new(at).starts_with(state));
    if let Some(mount) = below {
        bail!("{mount} is a mount on this host; it is not removed with {}: unmount it first", state.display());
    }
    fs::remove_dir_all(state).with_context(|| format!("removing {}", state.display()))
}
