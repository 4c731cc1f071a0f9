//! PURE: the arguments of each component.

use super::{Component, Plan, SERVICES, STATE, file};

pub(super) fn args(plan: &Plan, component: Component) -> Vec<String> {
    match component {
        Component::Containerd => vec![format!("--config={STATE}/{}", file::CONTAINERD)],
        Component::Etcd => etcd(),
        Component::KubeApiserver => apiserver(plan),
        Component::KubeControllerManager => controller_manager(),
        Component::KubeScheduler => scheduler(),
        Component::KubeProxy => proxy(plan),
        Component::Kubelet => kubelet(plan),
        Component::Coredns => vec![format!("-conf={STATE}/{}", file::COREFILE)],
    }
}

fn etcd() -> Vec<String> {
    [
        "--listen-client-urls=http://127.0.0.1:2379",
        "--advertise-client-urls=http://127.0.0.1:2379",
        "--listen-peer-urls=http://127.0.0.1:2380",
        &format!("--data-dir={STATE}/etcd"),
        // A killed process loses nothing by it; only a crash of the machine would.
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]
    .map(str::to_owned)
    .into()
}

fn apiserver(plan: &Plan) -> Vec<String> {
    let pki = format!("{STATE}/pki");
    let node = plan.subnet.node();
    vec![
        "--etcd-servers=http://127.0.0.1:2379".into(),
        "--bind-address=0.0.0.0".into(),
        format!("--advertise-address={node}"),
        format!("--secure-port={}", super::API_PORT),
        format!("--service-cluster-ip-range={SERVICES}"),
        "--authorization-mode=Node,RBAC".into(),
        "--enable-admission-plugins=NodeRestriction".into(),
        "--allow-privileged=true".into(),
        format!("--client-ca-file={pki}/ca.crt"),
        format!("--tls-cert-file={pki}/kube-apiserver.crt"),
        format!("--tls-private-key-file={pki}/kube-apiserver.key"),
        format!("--kubelet-client-certificate={pki}/kubelet-client.crt"),
        format!("--kubelet-client-key={pki}/kubelet-client.key"),
        format!("--kubelet-certificate-authority={pki}/ca.crt"),
        "--kubelet-preferred-address-types=InternalIP".into(),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local".into(),
        format!("--service-account-key-file={pki}/service-account.pub"),
        format!("--service-account-signing-key-file={pki}/service-account.key"),
        // What aggregated APIs (custom metrics, say) need to trust the API server's word about a caller.
        format!("--requestheader-client-ca-file={pki}/ca.crt"),
        "--requestheader-allowed-names=front-proxy-client".into(),
        "--requestheader-username-headers=X-Remote-User".into(),
        "--requestheader-group-headers=X-Remote-Group".into(),
        "--requestheader-extra-headers-prefix=X-Remote-Extra-".into(),
        format!("--proxy-client-cert-file={pki}/front-proxy-client.crt"),
        format!("--proxy-client-key-file={pki}/front-proxy-client.key"),
        format!("--audit-policy-file={STATE}/{}", file::AUDIT_POLICY),
        format!("--audit-log-path={STATE}/log/audit.jsonl"),
        // Tests remember a place in the file, so it must not be rotated under them.
        "--audit-log-maxsize=4096".into(),
        "--profiling=false".into(),
    ]
}

/// The three flags by which a component reaches the API server and lets it check who asks it.
fn api_access(component: Component) -> [String; 3] {
    let kubeconfig = format!("{STATE}/pki/{component}.kubeconfig");
    ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"].map(|flag| format!("--{flag}={kubeconfig}"))
}

fn controller_manager() -> Vec<String> {
    let pki = format!("{STATE}/pki");
    let mut args: Vec<String> = api_access(Component::KubeControllerManager).into();
    args.extend([
        format!("--root-ca-file={pki}/ca.crt"),
        format!("--service-account-private-key-file={pki}/service-account.key"),
        "--use-service-account-credentials=true".into(),
        format!("--cluster-signing-cert-file={pki}/ca.crt"),
        format!("--cluster-signing-key-file={pki}/ca.key"),
        "--leader-elect=false".into(),
        "--node-monitor-grace-period=10s".into(),
        // It makes a ServiceAccount and a token for each of its controllers first, and at the default rate of 20 a
        // second pods wait five seconds for that.
        "--kube-api-qps=500".into(),
        "--kube-api-burst=1000".into(),
        "--profiling=false".into(),
    ]);
    args
}

fn scheduler() -> Vec<String> {
    let mut args: Vec<String> = api_access(Component::KubeScheduler).into();
    args.extend(["--leader-elect=false".into(), "--profiling=false".into()]);
    args
}

fn proxy(plan: &Plan) -> Vec<String> {
    vec![
        format!("--kubeconfig={STATE}/pki/{}.kubeconfig", Component::KubeProxy),
        "--cluster-cidr=10.244.0.0/16".into(),
        "--proxy-mode=nftables".into(),
        // Neither may be raised without CAP_SYS_RESOURCE, and the host's limits are not ours to change.
        "--oom-score-adj=0".into(),
        "--conntrack-max-per-core=0".into(),
        format!("--hostname-override={}", plan.node_name()),
    ]
}

fn kubelet(plan: &Plan) -> Vec<String> {
    vec![
        format!("--config={STATE}/{}", file::KUBELET),
        format!("--kubeconfig={STATE}/pki/{}.kubeconfig", Component::Kubelet),
        format!("--hostname-override={}", plan.node_name()),
        format!("--node-ip={}", plan.subnet.node()),
        format!("--root-dir={STATE}/kubelet"),
        format!("--cert-dir={STATE}/kubelet/pki"),
    ]
}
