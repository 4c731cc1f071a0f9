//! PURE: the configuration files of the components.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::json;

use super::{DNS_READY_PORT, Plan, STATE};

/// Names of the files, relative to the state folder.
pub(crate) mod file {
    pub(crate) const CONTAINERD: &str = "config/containerd.toml";
    pub(crate) const CNI: &str = "config/cni/10-bridge.conflist";
    pub(crate) const KUBELET: &str = "config/kubelet.json";
    pub(crate) const RESOLV_CONF: &str = "config/resolv.conf";
    pub(crate) const AUDIT_POLICY: &str = "config/audit-policy.json";
    pub(crate) const COREFILE: &str = "config/Corefile";
}

pub(super) fn all(plan: &Plan) -> Vec<(&'static str, String)> {
    vec![
        (file::CONTAINERD, containerd()),
        (file::CNI, cni()),
        (file::KUBELET, kubelet(plan)),
        // Pods that ask for the node's own DNS get none: the cluster has no way out.
        (file::RESOLV_CONF, String::new()),
        (file::AUDIT_POLICY, audit_policy()),
        (file::COREFILE, corefile(plan)),
    ]
}

fn containerd() -> String {
    format!(
        r#"version = 3
root = "{STATE}/containerd"
state = "/run/containerd"

[grpc]
address = "{STATE}/run/containerd.sock"

[plugins."io.containerd.internal.v1.opt"]
path = "{STATE}/containerd/opt"

[plugins."io.containerd.nri.v1.nri"]
disable = true

[plugins."io.containerd.cri.v1.runtime"]
# Without CAP_SYS_RESOURCE a lower score is refused and no pod would start.
restrict_oom_score_adj = true

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
SystemdCgroup = false

[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["/usr/lib/cni"]
conf_dir = "{STATE}/config/cni"

[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{pause}"
"#,
        pause = crate::images::PAUSE,
    )
}

fn cni() -> String {
    json!({
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": true,
                "ipMasq": true,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": "10.244.0.0/24"}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
    .to_string()
}

fn kubelet(plan: &Plan) -> String {
    let pki = format!("{STATE}/pki");
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": false,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": plan.cgroup,
        "containerRuntimeEndpoint": format!("unix://{STATE}/run/containerd.sock"),
        "failSwapOn": false,
        "oomScoreAdj": 0,
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": format!("{pki}/ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": format!("{pki}/kubelet.crt"),
        "tlsPrivateKeyFile": format!("{pki}/kubelet.key"),
        "clusterDomain": "cluster.local",
        "clusterDNS": [plan.subnet.node().to_string()],
        "resolvConf": format!("{STATE}/{}", file::RESOLV_CONF),
        "podLogsDir": format!("{STATE}/log/pods"),
        "volumePluginDir": format!("{STATE}/kubelet/volume-plugins"),
        "maxPods": 200,
        // Images are imported, not pulled: one that were collected would not come back.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "1%",
            "nodefs.inodesFree": "1%",
            "imagefs.available": "1%",
        },
        // Renewed four times as often as this, well within the controller manager's 10 s of grace.
        "nodeLeaseDurationSeconds": 10,
    })
    .to_string()
}

/// Who did which verb on what, for every resource; bodies are left out, and so are the calls by which components only
/// show that they live.
fn audit_policy() -> String {
    json!({
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [
            {"level": "None", "nonResourceURLs": ["/healthz*", "/livez*", "/readyz*", "/version", "/openapi/*"]},
            {
                "level": "None",
                "userGroups": ["system:nodes"],
                "resources": [{"group": "coordination.k8s.io", "resources": ["leases"]}],
            },
            {"level": "Metadata"},
        ],
    })
    .to_string()
}

fn corefile(plan: &Plan) -> String {
    let node = plan.subnet.node();
    format!(
        ".:53 {{
    bind {node}
    errors
    ready {node}:{DNS_READY_PORT}
    kubernetes cluster.local {{
        kubeconfig {STATE}/pki/coredns.kubeconfig
    }}
    cache 5
}}
"
    )
}

/// A kubeconfig that needs no other file: PEM texts go in as they are.
pub(crate) fn kubeconfig(plan: &Plan, ca: &str, certificate: &str, key: &str) -> String {
    let context = format!("ernie-{}", plan.name);
    let server = plan.server();
    let [ca, certificate, key] = [ca, certificate, key].map(|pem| BASE64.encode(pem));
    format!(
        "apiVersion: v1
kind: Config
current-context: {context}
clusters:
- name: {context}
  cluster:
    server: {server}
    certificate-authority-data: {ca}
contexts:
- name: {context}
  context:
    cluster: {context}
    user: {context}
users:
- name: {context}
  user:
    client-certificate-data: {certificate}
    client-key-data: {key}
"
    )
}
