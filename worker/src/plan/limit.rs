//! How much memory this process may use: its control groups' limits, else the node's memory.

use std::path::Path;

use serde::{Deserialize, Serialize};

/// Where a limit comes from.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LimitSource {
    /// Set for this process, as `spec.resources.limits.memory` does.
    Cgroup,
    /// Nobody set one: all that the node has. Another node may have more.
    Node,
    /// A flag of this process.
    Flag,
    /// What is free on the accelerator.
    Device,
}

/// The memory that a model may take.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct MemoryLimit {
    /// How much, in bytes.
    pub bytes: u64,
    /// Where that is said.
    pub source: LimitSource,
}

impl MemoryLimit {
    /// A limit that was set for this process.
    pub fn cgroup(bytes: u64) -> Self {
        Self { bytes, source: LimitSource::Cgroup }
    }

    /// Reads the limit of this process; `None` where neither /proc nor /sys says anything.
    pub fn of_this_process() -> Option<Self> {
        let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let machine = machine(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default());
        match (cgroup(Path::new("/sys/fs/cgroup"), &groups), machine) {
            // version 1 writes "no limit" as a number larger than any machine
            (Some(group), Some(machine)) if group < machine => Some(Self::cgroup(group)),
            (Some(group), None) if group < 1 << 60 => Some(Self::cgroup(group)),
            (_, machine) => machine.map(|bytes| Self { bytes, source: LimitSource::Node }),
        }
    }
}

/// The smallest limit on the way from the process's group to the root; `groups` is the text of /proc/self/cgroup.
fn cgroup(root: &Path, groups: &str) -> Option<u64> {
    let limits = groups.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let (base, file) = if controllers.is_empty() {
            (root.to_owned(), "memory.max")
        } else if controllers.split(',').any(|controller| controller == "memory") {
            (root.join("memory"), "memory.limit_in_bytes")
        } else {
            return None;
        };
        smallest(&base, path, file)
    });
    limits.min()
}

/// The smallest number in `file` of a group or a group above it. A group that is not there (a container sees its own
/// as the root) counts as unlimited.
fn smallest(base: &Path, path: &str, file: &str) -> Option<u64> {
    let path = Path::new(path.trim_start_matches('/'));
    let read = |group: &Path| std::fs::read_to_string(base.join(group).join(file)).ok()?.trim().parse::<u64>().ok();
    path.ancestors().filter_map(read).min()
}

/// The machine's memory; `text` is that of /proc/meminfo.
fn machine(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(root: &Path, path: &str, file: &str, text: &str) {
        let folder = root.join(path);
        std::fs::create_dir_all(&folder).expect("a folder");
        std::fs::write(folder.join(file), text).expect("a file");
    }

    #[test]
    fn the_smallest_limit_above_a_group_counts() {
        let root = tempfile::tempdir().expect("a folder");
        group(root.path(), "kubepods", "memory.max", "4294967296\n");
        group(root.path(), "kubepods/pod", "memory.max", "max\n");
        group(root.path(), "kubepods/pod/container", "memory.max", "2147483648\n");
        assert_eq!(cgroup(root.path(), "0::/kubepods/pod/container\n"), Some(2 << 30));
        assert_eq!(cgroup(root.path(), "0::/kubepods/pod\n"), Some(4 << 30));
    }

    #[test]
    fn a_container_that_sees_its_group_as_the_root_is_limited_by_it() {
        let root = tempfile::tempdir().expect("a folder");
        group(root.path(), "", "memory.max", "1073741824\n");
        assert_eq!(cgroup(root.path(), "0::/\n"), Some(1 << 30));
        assert_eq!(cgroup(root.path(), "0::/not/visible/here\n"), Some(1 << 30));
    }

    #[test]
    fn version_1_is_read_from_the_memory_controller() {
        let root = tempfile::tempdir().expect("a folder");
        group(root.path(), "memory/pod", "memory.limit_in_bytes", "536870912\n");
        group(root.path(), "memory", "memory.limit_in_bytes", "9223372036854771712\n");
        let text = "4:cpu,cpuacct:/pod\n3:memory:/pod\n1:name=systemd:/x\n";
        assert_eq!(cgroup(root.path(), text), Some(512 << 20));
    }

    #[test]
    fn no_group_and_no_number_mean_no_limit() {
        let root = tempfile::tempdir().expect("a folder");
        group(root.path(), "", "memory.max", "max\n");
        assert_eq!(cgroup(root.path(), "0::/\n"), None);
        assert_eq!(cgroup(root.path(), "nonsense"), None);
    }

    #[test]
    fn the_machine_s_memory_is_in_kibibytes() {
        assert_eq!(machine("MemTotal:       24576000 kB\nMemFree: 1 kB\n"), Some(24_576_000 * 1024));
        assert_eq!(machine("MemFree: 1 kB\n"), None);
    }
}
