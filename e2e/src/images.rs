//! Container images without a container engine: the two that the cluster brings itself, and loading others.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::command::{self, run};

/// Image that holds a pod's namespaces open.
pub(crate) const PAUSE: &str = "docker.io/local/pause:1";
/// Image with busybox (`sh`, `nslookup`, `wget`, `cat`, …) and `grpcurl`, for tests that act from inside the cluster.
/// It is always loaded; use it with `imagePullPolicy: IfNotPresent`.
pub const TOOLBOX: &str = "docker.io/local/toolbox:1";
/// Changes when the two images must be made anew.
pub(crate) const RECIPE: &str = "images-2";
/// Debian's statically linked busybox.
pub(crate) const BUSYBOX: &str = "/bin/busybox";

/// Writes `pause.tar` and `toolbox.tar` (docker-archives) to the folder `images`, from the programs in `bin`.
pub(crate) fn write_own(bin: &Path, images: &Path) -> Result<()> {
    fs::create_dir_all(images).with_context(|| format!("making {}", images.display()))?;
    let root = images.join("root");
    executable(&bin.join("pause"), &root.join("pause"))?;
    archive(&root, PAUSE, json!({"Entrypoint": ["/pause"]}), &images.join("pause.tar"))?;
    fs::remove_dir_all(&root).with_context(|| format!("removing {}", root.display()))?;

    executable(Path::new(BUSYBOX), &root.join("bin/busybox"))?;
    executable(&bin.join("grpcurl"), &root.join("bin/grpcurl"))?;
    for applet in run(command::new(BUSYBOX).arg("--list"))?.lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", root.join("bin").join(applet)).with_context(|| format!("linking {applet}"))?;
    }
    fs::create_dir_all(root.join("etc")).context("making etc of the toolbox image")?;
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/:/bin/sh\nnobody:x:65532:65532:nobody:/:/bin/sh\n")
        .context("writing etc/passwd of the toolbox image")?;
    let scratch = root.join("tmp");
    fs::create_dir_all(&scratch).context("making tmp of the toolbox image")?;
    fs::set_permissions(&scratch, fs::Permissions::from_mode(0o1777)).context("opening tmp of the toolbox image")?;
    // Stops at once on the signal, and otherwise lives as long as a test needs it.
    let config = json!({
        "Cmd": ["/bin/sh", "-c", "trap 'exit 0' TERM INT; while :; do sleep 3600 & wait $!; done"],
        "Env": ["PATH=/bin"],
        "User": "65532:65532",
    });
    archive(&root, TOOLBOX, config, &images.join("toolbox.tar"))?;
    fs::remove_dir_all(&root).with_context(|| format!("removing {}", root.display()))
}

fn executable(from: &Path, to: &Path) -> Result<()> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
    }
    fs::copy(from, to).with_context(|| format!("copying {} to {}", from.display(), to.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("making {} executable", to.display()))
}

/// Packs the folder `root` as the only layer of an image `name` into the docker-archive `target`.
///
/// The same content gives the same bytes: times, owners and order are fixed.
pub fn archive(root: &Path, name: &str, config: serde_json::Value, target: &Path) -> Result<()> {
    let work = target.with_extension("parts");
    if work.exists() {
        fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))?;
    }
    fs::create_dir_all(&work).with_context(|| format!("making {}", work.display()))?;
    let layer = work.join("layer.tar");
    tar(root, &layer)?;
    let digest = Sha256::digest(fs::read(&layer).with_context(|| format!("reading {}", layer.display()))?);
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let image = json!({
        "architecture": architecture,
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
    });
    let manifest = json!([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]);
    for (file, content) in [("config.json", image), ("manifest.json", manifest)] {
        fs::write(work.join(file), content.to_string()).with_context(|| format!("writing {file}"))?;
    }
    tar(&work, target)?;
    fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))
}

fn tar(folder: &Path, target: &Path) -> Result<()> {
    run(command::new("tar")
        .args(["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner", "--format=gnu", "-C"])
        .arg(folder)
        .arg("-cf")
        .arg(target)
        .arg("."))?;
    Ok(())
}

/// Refuses a busybox that needs a dynamic linker, which an image without libraries does not have.
pub(crate) fn require_static_busybox() -> Result<()> {
    let program = fs::read(BUSYBOX).with_context(|| format!("reading {BUSYBOX} (Debian package busybox-static)"))?;
    // A dynamic program names its linker right after its headers.
    let header = program.get(..4096).unwrap_or(&program);
    ensure!(
        !header.windows(8).any(|window| window == b"ld-linux"),
        "{BUSYBOX} is linked dynamically; install the Debian package busybox-static"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_folder_gives_the_same_archive() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(root.join("etc/name"), "content").unwrap();
        let (one, two) = (folder.path().join("one.tar"), folder.path().join("two.tar"));
        archive(&root, "docker.io/local/x:1", json!({}), &one).unwrap();
        archive(&root, "docker.io/local/x:1", json!({}), &two).unwrap();
        assert_eq!(fs::read(one).unwrap(), fs::read(two).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3, "working files were left behind");
    }
}
