//! What a cluster needs from the host, and the little it changes there: a free subnet, and a few kernel settings that
//! are put back when the last cluster goes.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::command::{self, run};
use crate::images;
use crate::plan::Subnet;
use crate::progress::say;

/// Programs and files that the cluster uses and does not bring itself, with Debian's package for each.
const REQUIRED: [(&str, &str); 9] = [
    ("runc", "runc"),
    ("/usr/lib/cni/bridge", "containernetworking-plugins"),
    ("iptables", "iptables"),
    ("nft", "nftables"),
    ("ip", "iproute2"),
    ("conntrack", "conntrack"),
    ("ethtool", "ethtool"),
    ("unshare", "util-linux"),
    (images::BUSYBOX, "busybox-static"),
];

/// Says at once what is missing, instead of failing somewhere inside a component.
pub(crate) fn require_prerequisites() -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "a local cluster needs root: namespaces, mounts and a network link");
    let folders: Vec<PathBuf> = std::env::var_os("PATH")
        .iter()
        .flat_map(std::env::split_paths)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .collect();
    let there = |name: &str| folders.iter().any(|folder| folder.join(name).exists());
    let missing: Vec<&str> = REQUIRED.iter().filter(|(name, _)| !there(name)).map(|&(_, package)| package).collect();
    ensure!(
        missing.is_empty(),
        "missing on this machine: {}; `e2e/scripts/install-packages` installs them",
        missing.join(" ")
    );
    images::require_static_busybox()
}

/// A /24 that nothing on this host uses: no address and no route lies in it, or it in one.
///
/// Where all of 172.30.0.0/16 is taken (by a container engine's networks, say) it comes from 10.230.0.0/16.
pub(crate) fn free_subnet() -> Result<Subnet> {
    let routes = run(command::new("ip").args(["-4", "route", "show", "table", "all"]))?;
    let addresses = run(command::new("ip").args(["-4", "-oneline", "address", "show"]))?;
    let taken: Vec<(Ipv4Addr, u8)> = networks(&routes).chain(networks(&addresses)).collect();
    let candidates =
        [(172, 30), (10, 230)].into_iter().flat_map(|(a, b)| (0..=255).map(move |c| Ipv4Addr::new(a, b, c, 0)));
    for subnet in candidates.map(Subnet::containing) {
        if !taken.iter().any(|&(address, bits)| subnet.overlaps(address, bits)) {
            return Ok(subnet);
        }
    }
    bail!("no free /24 network in 172.30.0.0/16 or 10.230.0.0/16: this host has routes to all of them")
}

/// All IPv4 addresses and networks named in what `ip` prints. Default routes say `default`, so they are left out.
fn networks(listing: &str) -> impl Iterator<Item = (Ipv4Addr, u8)> + '_ {
    listing.split_whitespace().filter_map(|word| {
        let (address, bits) = word.split_once('/').unwrap_or((word, "32"));
        Some((address.parse().ok()?, bits.parse().ok()?))
    })
}

/// Kernel settings that are not per namespace: the inotify limit that we raise (the kubelet and containerd watch many
/// files), and those that a kubelet sets by itself.
const SETTINGS: [&str; 7] = [
    "fs/inotify/max_user_instances",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];
const INOTIFY_INSTANCES: u32 = 8192;

fn setting(name: &str) -> PathBuf {
    Path::new("/proc/sys").join(name)
}

fn saved_settings(root: &Path) -> PathBuf {
    root.join("host-settings.json")
}

/// Remembers the host's settings, unless an earlier cluster has done so, and raises what must be higher.
pub(crate) fn prepare_settings(root: &Path) -> Result<()> {
    let saved = saved_settings(root);
    if !saved.exists() {
        let mut values = BTreeMap::new();
        for name in SETTINGS {
            // One that this kernel lacks is one that nobody changes.
            if let Ok(value) = fs::read_to_string(setting(name)) {
                values.insert(name, value.trim().to_owned());
            }
        }
        let text = serde_json::to_string_pretty(&values).context("encoding the host's settings")?;
        let draft = saved.with_extension("draft");
        fs::write(&draft, text).with_context(|| format!("writing {}", draft.display()))?;
        fs::rename(&draft, &saved).with_context(|| format!("publishing {}", saved.display()))?;
    }
    let instances = setting(SETTINGS[0]);
    let now: u32 = fs::read_to_string(&instances).context("reading the inotify limit")?.trim().parse()?;
    if now < INOTIFY_INSTANCES {
        fs::write(&instances, INOTIFY_INSTANCES.to_string()).context("raising fs.inotify.max_user_instances")?;
    }
    Ok(())
}

/// Puts the host's settings back as they were before the first cluster.
pub(crate) fn restore_settings(root: &Path) -> Result<()> {
    let saved = saved_settings(root);
    let Ok(text) = fs::read_to_string(&saved) else { return Ok(()) };
    let values: BTreeMap<String, String> =
        serde_json::from_str(&text).with_context(|| format!("reading {}", saved.display()))?;
    for name in SETTINGS {
        let Some(value) = values.get(name) else { continue };
        let current = fs::read_to_string(setting(name)).unwrap_or_default();
        if current.trim() != value
            && let Err(error) = fs::write(setting(name), value)
        {
            say(&format!("kernel setting {name} could not be put back to {value}: {error}"));
        }
    }
    fs::remove_file(&saved).with_context(|| format!("removing {}", saved.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_found_in_what_ip_prints() {
        let routes = "default via 192.0.2.1 dev eth0\n\
                      local 127.0.0.0/8 dev lo table local\n\
                      172.30.0.0/24 dev ernie-1 proto kernel scope link src 172.30.0.254\n";
        let found: Vec<_> = networks(routes).collect();
        assert!(found.contains(&(Ipv4Addr::new(172, 30, 0, 0), 24)));
        assert!(found.contains(&(Ipv4Addr::new(127, 0, 0, 0), 8)));
        assert!(!found.iter().any(|&(_, bits)| bits == 0), "a default route takes no subnet");
    }
}
