//! PURE: what a cluster consists of — its components with their arguments, and the files they read.
//!
//! All paths in here are those inside the cluster's own mount namespace: the state folder is at [`STATE`] and the
//! compiled components at [`COMPONENTS`], wherever the cache is on the host. So a long or odd cache path never gets
//! into a socket address or a configuration file.

use std::fmt;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

mod files;
mod processes;

pub(crate) use files::{file, kubeconfig};

/// The state folder inside the cluster's mount namespace.
pub(crate) const STATE: &str = "/run/cluster";
/// The compiled components inside the cluster's mount namespace.
pub(crate) const COMPONENTS: &str = "/run/components";
/// Where components look for programs.
pub(crate) const PATH: &str = "/run/components/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// First address of the Service network: the `kubernetes` Service.
pub(crate) const KUBERNETES_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
/// The Service network.
pub(crate) const SERVICES: &str = "10.96.0.0/16";
/// Bridge inside the cluster that carries the node's address.
pub(crate) const NODE_BRIDGE: &str = "kube0";
/// The cluster's end of the link to the host.
pub(crate) const UPLINK: &str = "uplink";
/// Port of the API server.
pub(crate) const API_PORT: u16 = 6443;
/// Port of the DNS server's readiness endpoint.
pub(crate) const DNS_READY_PORT: u16 = 8181;

/// One process of the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Component {
    /// The container runtime. Pods outlive it.
    Containerd,
    /// The store behind the API server.
    Etcd,
    /// The API server.
    KubeApiserver,
    /// Deployments, ReplicaSets, garbage collection, endpoints and so on.
    KubeControllerManager,
    /// Binds pods to the node.
    KubeScheduler,
    /// Service addresses (nftables).
    KubeProxy,
    /// The node's agent.
    Kubelet,
    /// Names of Services for pods.
    Coredns,
}

impl Component {
    /// All components, in the order in which they are started.
    pub const ALL: [Self; 8] = [
        Self::Containerd,
        Self::Etcd,
        Self::KubeApiserver,
        Self::KubeControllerManager,
        Self::KubeScheduler,
        Self::KubeProxy,
        Self::Kubelet,
        Self::Coredns,
    ];

    /// The program's name, as in Kubernetes' own documentation.
    pub fn name(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Etcd => "etcd",
            Self::KubeApiserver => "kube-apiserver",
            Self::KubeControllerManager => "kube-controller-manager",
            Self::KubeScheduler => "kube-scheduler",
            Self::KubeProxy => "kube-proxy",
            Self::Kubelet => "kubelet",
            Self::Coredns => "coredns",
        }
    }
}

impl fmt::Display for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The /24 network between a cluster's node and the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Subnet(Ipv4Addr);

impl Subnet {
    /// The /24 that holds `address`.
    pub(crate) fn containing(address: Ipv4Addr) -> Self {
        let [a, b, c, _] = address.octets();
        Self(Ipv4Addr::new(a, b, c, 0))
    }

    fn at(self, last: u8) -> Ipv4Addr {
        let [a, b, c, _] = self.0.octets();
        Ipv4Addr::new(a, b, c, last)
    }

    /// The node's address: API server, kubelet, DNS.
    pub(crate) fn node(self) -> Ipv4Addr {
        self.at(1)
    }

    /// The host's address on the link.
    pub(crate) fn host(self) -> Ipv4Addr {
        self.at(254)
    }

    /// Whether any address is in both this network and `other`/`bits`.
    pub(crate) fn overlaps(self, other: Ipv4Addr, bits: u8) -> bool {
        let bits = u32::from(bits.min(24));
        let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
        self.0.to_bits() & mask == other.to_bits() & mask
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/24", self.0)
    }
}

/// What is decided once, when a cluster is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// The cluster's name.
    pub(crate) name: String,
    /// Network between node and host.
    pub(crate) subnet: Subnet,
    /// Absolute path of the cgroup below which pods live, such as `/ernie-1a2b3c4d`.
    pub(crate) cgroup: String,
    /// Key of the compiled components.
    pub(crate) components: String,
}

/// How to start one component.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    pub(crate) component: Component,
    pub(crate) args: Vec<String>,
}

impl Process {
    /// The program's path inside the cluster.
    pub(crate) fn program(&self) -> String {
        format!("{COMPONENTS}/bin/{}", self.component)
    }
}

impl Plan {
    /// The node's name in the API.
    pub(crate) fn node_name(&self) -> String {
        format!("{}-node", self.name)
    }

    /// URL of the API server, the same from inside and from the host.
    pub(crate) fn server(&self) -> String {
        format!("https://{}:{API_PORT}", self.subnet.node())
    }

    /// How each component is started, in order.
    pub(crate) fn processes(&self) -> Vec<Process> {
        Component::ALL.iter().map(|&component| Process { component, args: processes::args(self, component) }).collect()
    }

    /// Configuration files without secrets: path below the state folder, and content.
    pub(crate) fn files(&self) -> Vec<(&'static str, String)> {
        files::all(self)
    }

    /// Digest over everything that decides how the cluster behaves: a running cluster with another one was made by
    /// another version of this code.
    pub(crate) fn fingerprint(&self) -> String {
        let mut digest = Sha256::new();
        digest.update(&self.components);
        for process in self.processes() {
            digest.update(format!("\n{} {:?}", process.component, process.args));
        }
        for (path, content) in self.files() {
            digest.update(format!("\n{path}\n{content}"));
        }
        digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        Plan {
            name: "ernie".into(),
            subnet: Subnet::containing(Ipv4Addr::new(172, 30, 7, 0)),
            cgroup: "/ernie-00".into(),
            components: "key".into(),
        }
    }

    #[test]
    fn a_subnet_overlaps_what_contains_it_and_what_it_contains() {
        let subnet = Subnet::containing(Ipv4Addr::new(172, 30, 7, 9));
        assert!(subnet.overlaps(Ipv4Addr::new(172, 16, 0, 0), 12));
        assert!(subnet.overlaps(Ipv4Addr::new(172, 30, 7, 254), 32));
        assert!(!subnet.overlaps(Ipv4Addr::new(172, 30, 8, 0), 24));
        assert!(!subnet.overlaps(Ipv4Addr::new(172, 32, 0, 0), 11), "172.32/11 starts after the subnet");
        assert!(subnet.overlaps(Ipv4Addr::new(1, 2, 3, 4), 0), "0 bits is every address");
    }

    #[test]
    fn the_fingerprint_changes_with_the_components_and_with_the_network() {
        let fingerprint = plan().fingerprint();
        assert_ne!(fingerprint, Plan { components: "other".into(), ..plan() }.fingerprint());
        let subnet = Subnet::containing(Ipv4Addr::new(172, 30, 8, 0));
        assert_ne!(fingerprint, Plan { subnet, ..plan() }.fingerprint());
    }

    #[test]
    fn every_file_that_an_argument_names_below_the_state_folder_is_planned_or_made_at_run_time() {
        let plan = plan();
        let made: Vec<String> = plan.files().iter().map(|(path, _)| format!("{STATE}/{path}")).collect();
        for process in plan.processes() {
            for arg in &process.args {
                let path = arg.split_once('=').map_or(arg.as_str(), |(_, value)| value);
                let Some(rest) = path.strip_prefix(STATE) else { continue };
                let by_others =
                    ["/pki/", "/etcd", "/log/", "/kubelet", "/run/"].iter().any(|dir| rest.starts_with(dir));
                assert!(
                    by_others || made.iter().any(|file| file == path),
                    "{}: {path} is made by nobody",
                    process.component
                );
            }
        }
    }

    #[test]
    fn configuration_in_json_is_json() {
        for (path, content) in plan().files().iter().filter(|(path, _)| path.ends_with(".json")) {
            serde_json::from_str::<serde_json::Value>(content).unwrap_or_else(|error| panic!("{path}: {error}"));
        }
    }
}
