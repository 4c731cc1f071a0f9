//! Where everything that the cluster needs on disk lives: one folder under the user's cache.
//!
//! ```text
//! $XDG_CACHE_HOME/ernie-operator/        (or ~/.cache/ernie-operator/)
//!   components/KEY/bin/…                 the compiled Kubernetes, keyed by its sources
//!   components/KEY/images/…              the pause and toolbox images
//!   clusters/NAME/                       all state of one cluster; gone after `cluster down`
//!   locks/…                              one file a lock
//! ```

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::wait;

/// Longest path that a Unix socket address holds on Linux, without its closing zero byte.
const SOCKET_PATH_MAX: usize = 107;

/// A cluster's name: lower-case letters, digits and dashes, at most 20 characters, a letter first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterName(String);

impl ClusterName {
    /// The name that is used when nobody gives one: `$ERNIE_CLUSTER`, else `ernie`.
    pub fn from_environment() -> Result<Self> {
        match std::env::var("ERNIE_CLUSTER") {
            Ok(name) if !name.is_empty() => name.parse().context("ERNIE_CLUSTER"),
            _ => Ok(Self("ernie".to_owned())),
        }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for ClusterName {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        let legal = name.len() <= 20
            && name.starts_with(|c: char| c.is_ascii_lowercase())
            && !name.ends_with('-')
            && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
        ensure!(
            legal,
            "{name:?} is no cluster name: use at most 20 lower-case letters, digits and dashes, a letter first"
        );
        Ok(Self(name.to_owned()))
    }
}

impl std::fmt::Display for ClusterName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The project's folder under the user's cache, made if it is not there.
///
/// The path is absolute and free of links, since processes are recognised by it.
pub fn root() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|dir| Path::new(dir).is_absolute()) {
        Some(dir) => PathBuf::from(dir),
        None => std::env::home_dir().context("neither XDG_CACHE_HOME nor HOME is set")?.join(".cache"),
    };
    let root = base.join("ernie-operator");
    fs::create_dir_all(&root).with_context(|| format!("making the cache folder {}", root.display()))?;
    fs::canonicalize(&root).with_context(|| format!("resolving {}", root.display()))
}

/// The files of one cluster, as the host sees them.
#[derive(Debug, Clone)]
pub struct ClusterPaths {
    state: PathBuf,
    tag: String,
}

impl ClusterPaths {
    /// Paths of the cluster `name` under the cache folder `root`; nothing is made.
    pub fn new(root: &Path, name: &ClusterName) -> Result<Self> {
        let state = root.join("clusters").join(name.as_str());
        let digest = Sha256::digest(state.as_os_str().as_encoded_bytes());
        let tag = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
        let paths = Self { state, tag };
        let longest = paths.control_socket().as_os_str().len();
        ensure!(
            longest <= SOCKET_PATH_MAX,
            "the cache folder's path is too long: a socket in it would take {longest} bytes and Linux allows \
             {SOCKET_PATH_MAX}; set XDG_CACHE_HOME to a shorter path"
        );
        Ok(paths)
    }

    /// The folder that holds all of the cluster's state.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Short name for what the kernel holds for this cluster (network link, cgroup): the same for the same
    /// state folder, different for any other.
    pub fn kernel_name(&self) -> String {
        format!("ernie-{}", self.tag)
    }

    /// What was decided when the cluster was made (JSON).
    pub fn record(&self) -> PathBuf {
        self.state.join("cluster.json")
    }

    /// Exists once the cluster has been brought up to its end.
    pub(crate) fn complete(&self) -> PathBuf {
        self.state.join("complete")
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.state.join("kubeconfig")
    }

    /// Socket on which the cluster's first process takes requests.
    pub fn control_socket(&self) -> PathBuf {
        self.state.join("run/control.sock")
    }

    /// Standard output and error of the component or program `name`.
    pub fn log(&self, name: &str) -> PathBuf {
        self.state.join("log").join(format!("{name}.log"))
    }

    /// The API server's audit log, one JSON event a line.
    pub fn audit_log(&self) -> PathBuf {
        self.state.join("log/audit.jsonl")
    }
}

/// Takes the lock `name` for oneself alone, waiting for whoever holds it, and says so when that takes a while.
///
/// The lock ends with the returned file or with the process, however that ends.
pub(crate) async fn lock(root: &Path, name: &str, deadline: Duration) -> Result<File> {
    take(root, name, deadline, File::try_lock).await
}

/// As [`lock`], together with others who share it.
pub(crate) async fn lock_shared(root: &Path, name: &str, deadline: Duration) -> Result<File> {
    take(root, name, deadline, File::try_lock_shared).await
}

async fn take(
    root: &Path,
    name: &str,
    deadline: Duration,
    attempt: impl Fn(&File) -> Result<(), TryLockError>,
) -> Result<File> {
    let folder = root.join("locks");
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let path = folder.join(name);
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("opening the lock {}", path.display()))?;
    let mut told = false;
    wait::until(&format!("the lock {}", path.display()), deadline, async || match attempt(&file) {
        Ok(()) => Ok(Some(())),
        Err(TryLockError::WouldBlock) => {
            if !told {
                crate::progress::say(&format!("another process holds {name}; waiting for it"));
                told = true;
            }
            Ok(None)
        }
        Err(TryLockError::Error(error)) => bail!("locking {}: {error}", path.display()),
    })
    .await?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_escape_the_state_folder_are_refused() {
        for bad in ["", "..", "a/b", "A", "1a", "a-", "a_b", "a.b", "abcdefghijklmnopqrstu"] {
            assert!(bad.parse::<ClusterName>().is_err(), "{bad:?} was accepted");
        }
        assert_eq!("ernie-2".parse::<ClusterName>().unwrap().as_str(), "ernie-2");
    }

    #[test]
    fn clusters_of_the_same_name_in_two_caches_have_different_kernel_names() {
        let name: ClusterName = "ernie".parse().unwrap();
        let one = ClusterPaths::new(Path::new("/cache/one"), &name).unwrap();
        let two = ClusterPaths::new(Path::new("/cache/two"), &name).unwrap();
        assert_ne!(one.kernel_name(), two.kernel_name());
        assert!(one.kernel_name().len() <= 15, "longer than a network link's name may be");
    }

    #[test]
    fn a_cache_path_too_long_for_a_socket_is_refused_with_the_remedy() {
        let deep = PathBuf::from("/").join("x".repeat(90));
        let error = ClusterPaths::new(&deep, &"ernie".parse().unwrap()).unwrap_err();
        assert!(error.to_string().contains("XDG_CACHE_HOME"), "{error}");
    }
}
