//! Kubernetes, etcd, containerd, CoreDNS and the command-line clients, compiled from the Go module in `components/`.
//!
//! The result is kept in the cache under a key made of the module's sources, so it is built once (about twelve
//! minutes on two cores) and never again until a version changes.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::plan::Component;
use crate::progress::{Step, say};
use crate::{cache, images};

/// Version of Kubernetes that is built; the one that `components/go.mod` requires.
pub const KUBERNETES_VERSION: &str = "1.37.2";

/// Everything that decides what comes out: path in the module, content.
const SOURCES: [(&str, &str); 4] = [
    ("go.mod", include_str!("../components/go.mod")),
    ("go.sum", include_str!("../components/go.sum")),
    ("cmd/kubernetes/main.go", include_str!("../components/cmd/kubernetes/main.go")),
    ("cmd/pause/main.go", include_str!("../components/cmd/pause/main.go")),
];
/// Leaves out storage drivers that need headers or kernels we do not ask for.
const TAGS: &str = "no_btrfs no_zfs no_devmapper no_aufs";
/// The program that is all Kubernetes components, by the name of the link it is started through.
const MULTI_CALL: &str = "kubernetes";
/// Programs built beside it.
const OTHERS: [&str; 6] = [
    "./cmd/pause",
    "github.com/containerd/containerd/v2/cmd/containerd",
    "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
    "github.com/containerd/containerd/v2/cmd/ctr",
    "github.com/fullstorydev/grpcurl/cmd/grpcurl",
    "helm.sh/helm/v4/cmd/helm",
];
/// Whoever waits for another process's build waits at most this long.
const BUILD_DEADLINE: Duration = Duration::from_secs(3600);
/// Components that nothing has used for this long are removed when newer ones are built.
const UNUSED: Duration = Duration::from_secs(14 * 24 * 3600);

/// The compiled components in the cache.
#[derive(Debug, Clone)]
pub struct Components {
    folder: PathBuf,
    key: String,
}

impl Components {
    /// Key of the sources that they were built from.
    pub(crate) fn key(&self) -> &str {
        &self.key
    }

    /// Folder with `bin/` and `images/`.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Path of a program that runs on the host: `kubectl`, `helm`, `grpcurl`, `ctr`.
    pub fn program(&self, name: &str) -> PathBuf {
        self.folder.join("bin").join(name)
    }
}

/// The components under the cache folder `root`, built first if they are not there.
pub async fn ensure(root: &Path) -> Result<Components> {
    let key = key();
    let folder = root.join("components").join(&key);
    let components = Components { folder: folder.clone(), key };
    if !folder.exists() {
        let _lock = cache::lock(root, "components", BUILD_DEADLINE).await?;
        if !folder.exists() {
            build(&folder)?;
            remove_unused(&root.join("components"));
        }
    }
    // Marks them as used; a cache that cannot be written is no reason to stop.
    let _ = fs::File::open(&folder).and_then(|dir| dir.set_modified(SystemTime::now()));
    Ok(components)
}

fn key() -> String {
    let mut digest = Sha256::new();
    for (path, content) in SOURCES {
        digest.update(format!("{path} {}\n{content}", content.len()));
    }
    for part in OTHERS.iter().chain(&[TAGS, std::env::consts::ARCH, images::RECIPE]) {
        digest.update(format!("{part}\n"));
    }
    digest.update(ldflags());
    digest.finalize().iter().take(10).map(|byte| format!("{byte:02x}")).collect()
}

/// Without a stamped version the API server says v0.0.0 and Helm's version checks fail.
fn ldflags() -> String {
    let mut parts = KUBERNETES_VERSION.split('.');
    let (major, minor) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let mut flags = "-s -w".to_owned();
    for package in ["k8s.io/component-base/version", "k8s.io/client-go/pkg/version"] {
        flags += &format!(
            " -X {package}.gitVersion=v{KUBERNETES_VERSION} -X {package}.gitMajor={major} -X {package}.gitMinor={minor}"
        );
    }
    flags
}

fn build(folder: &Path) -> Result<()> {
    say("Kubernetes is not in the cache yet: building it from source, about 12 minutes on 2 cores, once");
    let work = folder.with_extension("building");
    if work.exists() {
        fs::remove_dir_all(&work).with_context(|| format!("removing {}, left by a killed build", work.display()))?;
    }
    let (source, bin) = (work.join("src"), work.join("bin"));
    for (path, content) in SOURCES {
        let path = source.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
        }
        fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
    }
    fs::create_dir_all(&bin).with_context(|| format!("making {}", bin.display()))?;

    go_build(
        &format!("compiling Kubernetes {KUBERNETES_VERSION}, etcd and CoreDNS"),
        &source,
        &bin,
        &["./cmd/kubernetes"],
    )?;
    go_build("compiling containerd, helm and grpcurl", &source, &bin, &OTHERS)?;
    let links = Component::ALL.iter().filter(|&&component| component != Component::Containerd).map(|c| c.name());
    for name in links.chain(["kubectl"]) {
        symlink(MULTI_CALL, bin.join(name)).with_context(|| format!("linking {name}"))?;
    }
    images::write_own(&bin, &work.join("images"))?;
    fs::remove_dir_all(&source).with_context(|| format!("removing {}", source.display()))?;
    fs::rename(&work, folder).with_context(|| format!("publishing {}", folder.display()))
}

fn go_build(what: &str, source: &Path, bin: &Path, packages: &[&str]) -> Result<()> {
    let mut step = Step::begin(what);
    // The lowest claim on the processor that still uses all of it when nobody else does.
    let mut child = Command::new("nice")
        .args([
            "go",
            "build",
            "-v",
            "-mod=readonly",
            "-trimpath",
            "-buildvcs=false",
            "-tags",
            TAGS,
            "-ldflags",
            &ldflags(),
        ])
        .arg("-o")
        .arg(format!("{}/", bin.display()))
        .args(packages)
        .current_dir(source)
        .envs([("CGO_ENABLED", "0"), ("GOFLAGS", ""), ("GOWORK", "off")])
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting `go build`: is Go 1.26 or newer installed and on the PATH?")?;
    let (mut downloaded, mut compiled) = (0_usize, 0_usize);
    let mut tail: Vec<String> = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        for line in BufReader::new(stderr).lines() {
            let line = line.context("reading what `go build` says")?;
            if line.starts_with("go: downloading ") {
                downloaded += 1;
            } else {
                compiled += 1;
            }
            step.advance(|| match compiled {
                0 => format!("{downloaded} modules downloaded"),
                _ => format!("{compiled} packages compiled, last {line}"),
            });
            tail.push(line);
            if tail.len() > 30 {
                tail.remove(0);
            }
        }
    }
    let status = child.wait().context("waiting for `go build`")?;
    if !status.success() {
        bail!("{what} failed ({status}); `go build` ended with:\n{}", tail.join("\n"));
    }
    step.finish();
    Ok(())
}

/// Removes components of other versions that nothing has used for long. Best effort: it only frees disk.
fn remove_unused(components: &Path) {
    let Ok(entries) = fs::read_dir(components) else { return };
    for entry in entries.flatten() {
        let age = entry.metadata().and_then(|data| data.modified()).ok().and_then(|time| time.elapsed().ok());
        if age.is_some_and(|age| age > UNUSED) {
            say(&format!("removing {}, unused for {} days", entry.path().display(), UNUSED.as_secs() / 86_400));
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_module_requires_the_version_that_is_stamped() {
        let (_, go_mod) = SOURCES[0];
        assert!(
            go_mod.contains(&format!("k8s.io/kubernetes v{KUBERNETES_VERSION}\n")),
            "go.mod and the stamp disagree"
        );
    }

    #[test]
    fn each_other_program_is_required_by_the_module() {
        let (_, go_mod) = SOURCES[0];
        for package in OTHERS.iter().filter(|package| !package.starts_with("./")) {
            let module = package.split("/cmd/").next().unwrap();
            assert!(go_mod.contains(&format!("{module} v")), "{module} is not in go.mod");
        }
    }
}
