//! Whether a cluster can be used: the API server answers, the node takes pods, names resolve.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::{Node, ServiceAccount};
use kube::api::{Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use serde_json::json;

use crate::cache::ClusterPaths;
use crate::pki::{DNS_CLIENT, KUBELET_CLIENT};
use crate::plan::{DNS_READY_PORT, Plan};
use crate::wait;

/// Port of kube-proxy's health endpoint.
const PROXY_HEALTH_PORT: u16 = 10256;

/// Looks at a running cluster through its API and its health endpoints.
pub(crate) struct Health {
    client: Client,
    node: String,
    dns: SocketAddr,
    proxy: SocketAddr,
}

impl Health {
    pub(crate) async fn new(paths: &ClusterPaths, plan: &Plan) -> Result<Self> {
        let address = plan.subnet.node();
        Ok(Self {
            client: client(&paths.kubeconfig()).await?,
            node: plan.node_name(),
            dns: (address, DNS_READY_PORT).into(),
            proxy: (address, PROXY_HEALTH_PORT).into(),
        })
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// An error that says what does not work.
    pub(crate) async fn all(&self) -> Result<()> {
        self.api().await?;
        ensure!(self.node_ready().await?, "node {} is not ready", self.node);
        ensure!(answers(self.dns, "/ready"), "the DNS server is not ready");
        ensure!(answers(self.proxy, "/healthz"), "kube-proxy is not healthy");
        Ok(())
    }

    async fn api(&self) -> Result<()> {
        let request = http::Request::get("/readyz").body(Vec::new())?;
        self.client.request_text(request).await.context("the API server is not ready")?;
        Ok(())
    }

    async fn node_ready(&self) -> Result<bool> {
        let node = Api::<Node>::all(self.client.clone()).get_opt(&self.node).await.context("reading the node")?;
        let conditions = node.and_then(|node| node.status).and_then(|status| status.conditions).unwrap_or_default();
        Ok(conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True"))
    }

    pub(crate) async fn wait_for_api(&self, deadline: Duration) -> Result<()> {
        wait::until("the API server to be ready", deadline, async || Ok(self.api().await.ok())).await
    }

    pub(crate) async fn wait_for_node(&self, deadline: Duration) -> Result<()> {
        let what = format!("node {} to be ready", self.node);
        wait::until(&what, deadline, async || Ok(self.node_ready().await.unwrap_or_default().then_some(()))).await
    }

    /// Without it no pod of the namespace is admitted.
    pub(crate) async fn wait_for_service_account(&self, deadline: Duration) -> Result<()> {
        let accounts = Api::<ServiceAccount>::namespaced(self.client.clone(), "default");
        wait::until("the default ServiceAccount", deadline, async || {
            Ok(accounts.get_opt("default").await.ok().flatten().map(drop))
        })
        .await
    }

    pub(crate) async fn wait_for_dns(&self, deadline: Duration) -> Result<()> {
        wait::until("the DNS server", deadline, async || Ok(answers(self.dns, "/ready").then_some(()))).await
    }

    pub(crate) async fn wait_for_proxy(&self, deadline: Duration) -> Result<()> {
        wait::until("kube-proxy", deadline, async || Ok(answers(self.proxy, "/healthz").then_some(()))).await
    }
}

/// A client for the kubeconfig at `path`, whatever `KUBECONFIG` says.
pub(crate) async fn client(path: &std::path::Path) -> Result<Client> {
    let kubeconfig = Kubeconfig::read_from(path).with_context(|| format!("reading {}", path.display()))?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Client::try_from(config).with_context(|| format!("making a client from {}", path.display()))
}

/// Whether a plain HTTP GET gives status 200 within a second.
fn answers(address: SocketAddr, path: &str) -> bool {
    let get = || -> Result<bool> {
        let second = Duration::from_secs(1);
        let mut stream = TcpStream::connect_timeout(&address, second)?;
        stream.set_read_timeout(Some(second))?;
        stream.set_write_timeout(Some(second))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
        let mut head = [0; 12];
        stream.read_exact(&mut head)?;
        Ok(head == *b"HTTP/1.1 200")
    };
    get().unwrap_or_default()
}

/// Lets the DNS server read Services and the API server call the kubelet.
pub(crate) async fn grant(client: &Client) -> Result<()> {
    let role = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": DNS_CLIENT},
        "rules": [
            {"apiGroups": [""], "resources": ["services", "pods", "namespaces", "endpoints"], "verbs": ["list", "watch"]},
            {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
        ],
    });
    apply(client, "clusterroles", &role).await?;
    for (user, role) in [(DNS_CLIENT, DNS_CLIENT), (KUBELET_CLIENT, "system:kubelet-api-admin")] {
        let binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": user},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
        });
        apply(client, "clusterrolebindings", &binding).await?;
    }
    Ok(())
}

async fn apply(client: &Client, plural: &str, object: &serde_json::Value) -> Result<()> {
    let Some(name) = object["metadata"]["name"].as_str() else { bail!("an object without a name: {object}") };
    let kind = object["kind"].as_str().unwrap_or_default();
    let resource = kube::api::ApiResource {
        group: "rbac.authorization.k8s.io".into(),
        version: "v1".into(),
        api_version: "rbac.authorization.k8s.io/v1".into(),
        kind: kind.into(),
        plural: plural.into(),
    };
    let api: Api<kube::api::DynamicObject> = Api::all_with(client.clone(), &resource);
    let params = PatchParams::apply("ernie-local-cluster").force();
    api.patch(name, &params, &Patch::Apply(object)).await.with_context(|| format!("applying {kind} {name}"))?;
    Ok(())
}
