//! How many threads this process should use: affinity, physical cores and the cgroup's quota.

use std::fmt;
use std::fs;
use std::path::Path;

/// The processors that this process may use.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cpus {
    /// Logical CPUs in the affinity mask.
    pub logical: usize,
    /// Physical cores among them.
    pub cores: usize,
    /// CPU time per time that the cgroups allow, if limited (0.5 = half a core).
    pub quota: Option<f64>,
}

impl Cpus {
    /// Reads affinity, topology and cgroups (v1 and v2). What cannot be read does not limit.
    pub fn detect() -> Cpus {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).map(cpu_list);
        let available = std::thread::available_parallelism().map_or(1, usize::from);
        let allowed = allowed.filter(|list| !list.is_empty()).unwrap_or_else(|| (0..available).collect());
        let mut cores: Vec<String> = allowed.iter().map(|&cpu| core_of(cpu)).collect();
        cores.sort_unstable();
        cores.dedup();
        Cpus { logical: allowed.len(), cores: cores.len(), quota: quota(Path::new("/")) }
    }

    /// Threads to use: one for each physical core, no more than the quota pays for in full, at least one. More than
    /// that is throttled by the cgroup or shares a core's arithmetic units.
    pub fn threads(&self) -> usize {
        let paid = self.quota.map_or(usize::MAX, |quota| quota.floor() as usize);
        self.cores.min(self.logical).min(paid).max(1)
    }
}

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} CPUs on {} cores", self.logical, self.cores)?;
        match self.quota {
            Some(quota) if quota < 1.0 => {
                write!(f, ", limited to {quota:.2} CPUs: one thread that the kernel will throttle")
            }
            Some(quota) => write!(f, ", limited to {quota:.2} CPUs"),
            None => Ok(()),
        }
    }
}

/// What identifies the physical core of a logical CPU: the list of its hardware threads, or itself when unknown.
fn core_of(cpu: usize) -> String {
    let siblings = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
    fs::read_to_string(siblings).map_or_else(|_| cpu.to_string(), |list| list.trim().to_owned())
}

/// CPU numbers of a list such as `0-3,8,10-11`.
fn cpu_list(text: &str) -> Vec<usize> {
    let range = |item: &str| {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        Some(first.trim().parse::<usize>().ok()?..=last.trim().parse::<usize>().ok()?)
    };
    // The kernel's limit is 8192 CPUs; a longer list is not one.
    text.trim().split(',').filter_map(range).filter(|range| *range.end() < 1 << 16).flatten().collect()
}

/// The smallest quota of the process's cgroups and their ancestors, under `root` (`/` but for tests).
fn quota(root: &Path) -> Option<f64> {
    let own = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mut smallest: Option<f64> = None;
    for line in own.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let unified = controllers.is_empty();
        let mounts: &[&str] = match unified {
            true => &["sys/fs/cgroup", "sys/fs/cgroup/unified"],
            false if controllers.split(',').any(|name| name == "cpu") => {
                &["sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct"]
            }
            false => continue,
        };
        for mount in mounts {
            // Inside a container the path may be the host's, of which only the mount's root is visible.
            for group in Path::new(path.trim_start_matches('/')).ancestors() {
                let group = root.join(mount).join(group);
                let read = |name: &str| fs::read_to_string(group.join(name)).ok();
                let limit = match unified {
                    true => read("cpu.max").and_then(|text| v2_quota(&text)),
                    false => {
                        read("cpu.cfs_quota_us").zip(read("cpu.cfs_period_us")).and_then(|(q, p)| v1_quota(&q, &p))
                    }
                };
                smallest = limit.into_iter().chain(smallest).reduce(f64::min);
            }
        }
    }
    smallest
}

/// `cpu.max`: `QUOTA PERIOD` or `max PERIOD`.
fn v2_quota(text: &str) -> Option<f64> {
    let (quota, period) = text.trim().split_once(' ')?;
    v1_quota(quota, period)
}

/// `cpu.cfs_quota_us` and `cpu.cfs_period_us`; −1 is no limit.
fn v1_quota(quota: &str, period: &str) -> Option<f64> {
    let quota: f64 = quota.trim().parse().ok()?;
    let period: f64 = period.trim().parse().ok()?;
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(name: &str, files: &[(&str, &str)]) -> std::path::PathBuf {
        let root = std::env::temp_dir().join(format!("ernie-kernels-{name}-{}", std::process::id()));
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().expect("a file in a folder")).expect("folders");
            fs::write(path, text).expect("file");
        }
        root
    }

    #[test]
    fn this_machine_has_at_least_one_thread_and_no_more_than_the_standard_library_counts() {
        let cpus = Cpus::detect();
        let available = std::thread::available_parallelism().expect("countable").get();
        assert!((1..=available).contains(&cpus.threads()), "{cpus:?}, {available}");
        assert!(cpus.cores <= cpus.logical);
    }

    #[test]
    fn threads_are_whole_paid_cores_and_at_least_one() {
        let cpus = |logical, cores, quota| Cpus { logical, cores, quota }.threads();
        assert_eq!(cpus(8, 4, None), 4);
        assert_eq!(cpus(8, 4, Some(2.9)), 2);
        assert_eq!(cpus(128, 64, Some(0.5)), 1);
        assert_eq!(cpus(128, 128, None), 128);
        let text = Cpus { logical: 128, cores: 64, quota: Some(0.5) }.to_string();
        assert!(text.contains("128 CPUs on 64 cores") && text.contains("0.50 CPUs: one thread"), "{text}");
    }

    #[test]
    fn cpu_lists_are_read_and_nonsense_in_them_is_not() {
        assert_eq!(cpu_list("\t0-3,8,10-11\n"), [0, 1, 2, 3, 8, 10, 11]);
        assert_eq!(cpu_list(" 5"), [5]);
        assert_eq!(cpu_list("a-b,3,0-99999999999,7-"), [3]);
        assert!(cpu_list("").is_empty());
    }

    #[test]
    fn the_tightest_quota_of_all_ancestors_counts_in_version_2() {
        let root = tree(
            "v2",
            &[
                ("proc/self/cgroup", "0::/pods/one/box\n"),
                ("sys/fs/cgroup/pods/one/box/cpu.max", "max 100000\n"),
                ("sys/fs/cgroup/pods/one/cpu.max", "150000 100000\n"),
                ("sys/fs/cgroup/pods/cpu.max", "800000 100000\n"),
            ],
        );
        assert_eq!(quota(&root), Some(1.5));
        fs::remove_dir_all(root).expect("removed");
    }

    #[test]
    fn a_quota_is_found_in_version_1_even_when_the_path_is_the_hosts() {
        let root = tree(
            "v1",
            &[
                ("proc/self/cgroup", "5:memory:/kubepods/x\n4:cpu,cpuacct:/kubepods/x\n0::/\n"),
                ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "50000\n"),
                ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
            ],
        );
        assert_eq!(quota(&root), Some(0.5));
        fs::remove_dir_all(root).expect("removed");
    }

    #[test]
    fn without_limits_there_is_no_quota() {
        let root = tree(
            "none",
            &[
                ("proc/self/cgroup", "1:cpu:/\n0::/\nrubbish\n"),
                ("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n"),
                ("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"),
                ("sys/fs/cgroup/cpu.max", "max 100000\n"),
            ],
        );
        assert_eq!(quota(&root), None);
        fs::remove_dir_all(root).expect("removed");
    }
}
