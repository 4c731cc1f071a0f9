//! Bringing clusters up and down, and what happens to those that are killed.
//!
//! These clusters have names of their own, so the one that other tests share is not touched.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ernie_e2e::cache::{self, ClusterName};
use ernie_e2e::lifecycle::{LocalCluster, Outcome};
use ernie_e2e::{Cluster, wait};
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::{Mutex, MutexGuard};

const PROGRAM: &str = env!("CARGO_BIN_EXE_cluster");
/// Longest that anything here may take on a busy machine.
const DEADLINE: Duration = Duration::from_secs(120);
/// Folders outside the cache into which an ordinary node's components write.
const NODE_FOLDERS: [&str; 12] = [
    "/etc/cni",
    "/opt/cni",
    "/opt/containerd",
    "/opt/nri",
    "/run/containerd",
    "/run/netns",
    "/usr/libexec/kubernetes",
    "/var/lib/cni",
    "/var/lib/containerd",
    "/var/lib/kubelet",
    "/var/log/containers",
    "/var/log/pods",
];

/// One test at a time: each cluster takes about a gigabyte and two processors to start.
async fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::const_new(());
    let turn = TURN.lock().await;
    down_abandoned().await;
    turn
}

/// Ends clusters of test processes that were killed.
async fn down_abandoned() {
    for entry in fs::read_dir(cache::root().unwrap().join("clusters")).into_iter().flatten().flatten() {
        let name = entry.file_name().into_string().unwrap();
        let owner = name.strip_prefix("t-").and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|owner| !Path::new("/proc").join(owner).exists()) {
            LocalCluster::new(name.parse().unwrap()).unwrap().down().await.unwrap();
        }
    }
}

/// A cluster of this test process, ended with the value.
struct Own(LocalCluster);

impl Own {
    fn new(suffix: &str) -> Self {
        let name: ClusterName = format!("t-{}-{suffix}", std::process::id()).parse().unwrap();
        Self(LocalCluster::new(name).unwrap())
    }

    async fn up(&self) -> Outcome {
        self.0.up(Path::new(PROGRAM)).await.unwrap()
    }

    async fn handle(&self) -> Cluster {
        Cluster::local(self.0.name().clone(), false).await.unwrap()
    }

    /// Runs `cluster SUBCOMMAND` for this cluster.
    fn command(&self, subcommand: &str) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args([subcommand, "--name", self.0.name().as_str()]).stdin(Stdio::null());
        command
    }

    /// All processes in the cluster's PID namespace and those below it.
    fn processes(&self) -> BTreeSet<u32> {
        let first = self.0.first_process().expect("the cluster is not up");
        let mut found = BTreeSet::from([first]);
        // Parents come before their children sooner or later: repeat until nothing new is found.
        loop {
            let more: Vec<u32> = all_processes()
                .filter(|&id| !found.contains(&id) && parent(id).is_some_and(|parent| found.contains(&parent)))
                .collect();
            if more.is_empty() {
                return found;
            }
            found.extend(more);
        }
    }

    fn kernel_objects(&self) -> Vec<PathBuf> {
        let name = self.0.paths().kernel_name();
        let mut places = vec![PathBuf::from("/sys/class/net").join(&name), PathBuf::from("/sys/fs/cgroup").join(&name)];
        for hierarchy in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
            places.push(hierarchy.path().join(&name));
        }
        places.retain(|place| place.exists());
        places
    }

    async fn assert_nothing_is_left(&self, processes: &BTreeSet<u32>) {
        assert_none_runs(processes).await;
        assert_eq!(self.kernel_objects(), Vec::<PathBuf>::new(), "links or cgroups are left");
        let state = self.0.paths().state();
        assert!(!state.exists(), "{} is left", state.display());
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(state.to_str().unwrap()), "mounts are left");
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        let _ = self.command("down").stdout(Stdio::null()).status();
    }
}

fn all_processes() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn parent(id: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

fn kill(id: u32) {
    let pid = Pid::from_raw(i32::try_from(id).unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
}

/// No process of these is left. One that has ended may still wait for this machine's init to take note of it.
async fn assert_none_runs(processes: &BTreeSet<u32>) {
    let status = |id: &u32| fs::read_to_string(format!("/proc/{id}/status")).ok();
    let running: Vec<String> = processes.iter().filter_map(status).filter(|text| !text.contains("(zombie)")).collect();
    assert!(running.is_empty(), "processes are left: {running:#?}");
    wait::until("init to reap", DEADLINE, async || Ok(processes.iter().all(|id| status(id).is_none()).then_some(())))
        .await
        .unwrap();
}

async fn run_a_pod(cluster: &Cluster) {
    let namespace = cluster.namespace("life").await.unwrap();
    namespace.toolbox("tool").await.unwrap();
    let resolved = namespace.exec("tool", &["nslookup", "kubernetes.default.svc.cluster.local"]).await.unwrap();
    assert!(resolved.contains("10.96.0.1"), "{resolved}");
}

#[tokio::test]
async fn up_again_says_so_at_once_and_down_leaves_nothing_outside_the_cache() {
    let _turn = turn().await;
    let folders_before: Vec<bool> = NODE_FOLDERS.iter().map(|folder| Path::new(folder).exists()).collect();
    let own = Own::new("a");
    assert_eq!(own.up().await, Outcome::Made);
    let first = own.0.first_process();
    assert_eq!(own.up().await, Outcome::AlreadyUp);
    assert_eq!(own.0.first_process(), first, "the second `up` started another cluster");
    run_a_pod(&own.handle().await).await;
    assert!(own.command("status").status().unwrap().success());

    let processes = own.processes();
    assert!(processes.len() > 8, "fewer processes than components: {processes:?}");
    assert!(own.kernel_objects().len() >= 2, "no link or no cgroup under the expected name");
    assert!(own.command("down").status().unwrap().success());
    own.assert_nothing_is_left(&processes).await;
    let folders_after: Vec<bool> = NODE_FOLDERS.iter().map(|folder| Path::new(folder).exists()).collect();
    assert_eq!(folders_before, folders_after, "a component wrote outside the cache: {NODE_FOLDERS:?}");
    assert_eq!(own.command("status").status().unwrap().code(), Some(3), "the status of a cluster that is down");
}

#[tokio::test]
async fn two_clusters_run_side_by_side_and_the_end_of_one_leaves_the_other() {
    let _turn = turn().await;
    let (one, two) = (Own::new("b"), Own::new("c"));
    one.up().await;
    two.up().await;
    let servers: Vec<String> =
        [&one, &two].map(|own| own.0.paths().kubeconfig()).iter().map(|path| server_in(path)).collect();
    assert_ne!(servers[0], servers[1]);
    // The kubelets must not take each other's pods for abandoned ones.
    let handles = (one.handle().await, two.handle().await);
    tokio::join!(run_a_pod(&handles.0), run_a_pod(&handles.1));

    let processes = one.processes();
    drop(handles.0);
    one.0.down().await.unwrap();
    one.assert_nothing_is_left(&processes).await;
    run_a_pod(&handles.1).await;
}

#[tokio::test]
async fn a_cluster_killed_while_it_runs_does_not_disturb_the_next() {
    let _turn = turn().await;
    let own = Own::new("d");
    own.up().await;
    let handle = own.handle().await;
    let namespace = handle.namespace("life").await.unwrap();
    namespace.toolbox("tool").await.unwrap();
    let processes = own.processes();
    kill(own.0.first_process().unwrap());
    // Its namespace cannot be deleted any more, nor need it be.
    std::mem::forget(namespace);
    drop(handle);
    assert_eq!(own.up().await, Outcome::Made);
    assert_none_runs(&processes).await;
    run_a_pod(&own.handle().await).await;
}

#[tokio::test]
async fn an_up_killed_at_any_step_does_not_disturb_the_next() {
    let _turn = turn().await;
    let own = Own::new("e");
    let paths = own.0.paths().clone();
    let link = Path::new("/sys/class/net").join(paths.kernel_name());
    // One file for each step: keys made, first process started, link made, store, API server, kubelet started.
    let steps = [
        paths.kubeconfig(),
        paths.log("init"),
        link,
        paths.log("etcd"),
        paths.log("kube-apiserver"),
        paths.log("kubelet"),
    ];
    for step in steps {
        own.0.down().await.unwrap();
        let mut up = own.command("up").spawn().unwrap();
        wait_for(&mut up, &step).await;
        up.kill().unwrap();
        up.wait().unwrap();
    }
    assert_eq!(own.up().await, Outcome::Made, "what the last killed `up` left was taken for a whole cluster");
    run_a_pod(&own.handle().await).await;
    let processes = own.processes();
    own.0.down().await.unwrap();
    own.assert_nothing_is_left(&processes).await;
}

#[tokio::test]
async fn a_cluster_whose_components_were_stopped_is_healed_by_up() {
    let _turn = turn().await;
    let own = Own::new("f");
    own.up().await;
    let first = own.0.first_process();
    {
        let handle = Cluster::local(own.0.name().clone(), true).await.unwrap();
        let faults = handle.faults().unwrap();
        faults.kill(ernie_e2e::Component::KubeScheduler).unwrap();
        faults.pause(ernie_e2e::Component::KubeControllerManager).unwrap();
        // As if this test process were killed: nothing sets it right.
        std::mem::forget(faults);
    }
    assert_eq!(own.command("status").status().unwrap().code(), Some(3));
    assert_eq!(own.up().await, Outcome::Healed);
    assert_eq!(own.0.first_process(), first);
    run_a_pod(&own.handle().await).await;
}

fn server_in(kubeconfig: &Path) -> String {
    let text = fs::read_to_string(kubeconfig).unwrap();
    text.lines().find_map(|line| line.trim().strip_prefix("server: ")).unwrap().to_owned()
}

async fn wait_for(up: &mut Child, path: &Path) {
    wait::until(&format!("{}", path.display()), DEADLINE, async || {
        assert!(up.try_wait().unwrap().is_none(), "`cluster up` ended before {} was there", path.display());
        Ok(path.exists().then_some(()))
    })
    .await
    .unwrap();
}
