//! Certificates and keys of a cluster: one authority, a certificate for each component, an administrator.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use jiff::{Timestamp, ToSpan};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType, date_time_ymd,
};

use crate::plan::{self, Component, KUBERNETES_SERVICE, Plan};

/// Who a certificate speaks for, and where it may be used.
struct Identity {
    /// File name without its ending, below `pki/`.
    file: &'static str,
    common_name: String,
    organisation: Option<&'static str>,
    /// Names and addresses that a server with this certificate answers for; none for a client.
    served: Vec<SanType>,
}

impl Identity {
    fn client(file: &'static str, common_name: impl Into<String>, organisation: Option<&'static str>) -> Self {
        Self { file, common_name: common_name.into(), organisation, served: Vec::new() }
    }
}

/// User name by which the API server calls the kubelet (logs, exec).
pub(crate) const KUBELET_CLIENT: &str = "kube-apiserver-kubelet-client";
/// User name by which the DNS server reads Services.
pub(crate) const DNS_CLIENT: &str = "system:coredns";

fn identities(plan: &Plan) -> Result<Vec<Identity>> {
    let node = IpAddr::from(plan.subnet.node());
    let node_name = plan.node_name();
    let mut served = Vec::new();
    for name in [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        "localhost",
    ] {
        served.push(SanType::DnsName(name.try_into()?));
    }
    served.extend([KUBERNETES_SERVICE.into(), [127, 0, 0, 1].into(), node].map(SanType::IpAddress));
    Ok(vec![
        Identity { file: "kube-apiserver", common_name: "kube-apiserver".into(), organisation: None, served },
        Identity {
            file: "kubelet",
            common_name: format!("system:node:{node_name}"),
            organisation: Some("system:nodes"),
            served: vec![SanType::DnsName(node_name.as_str().try_into()?), SanType::IpAddress(node)],
        },
        Identity::client("kubelet-client", KUBELET_CLIENT, None),
        Identity::client("front-proxy-client", "front-proxy-client", None),
        Identity::client("admin", "kubernetes-admin", Some("system:masters")),
        Identity::client("kube-controller-manager", "system:kube-controller-manager", None),
        Identity::client("kube-scheduler", "system:kube-scheduler", None),
        Identity::client("kube-proxy", "system:kube-proxy", None),
        Identity::client("coredns", DNS_CLIENT, None),
    ])
}

/// Components that read a kubeconfig of their own from `pki/NAME.kubeconfig`.
const WITH_KUBECONFIG: [Component; 5] = [
    Component::KubeControllerManager,
    Component::KubeScheduler,
    Component::KubeProxy,
    Component::Kubelet,
    Component::Coredns,
];

/// Writes all keys, certificates and kubeconfigs of the cluster below `state`, with mode 0600.
pub(crate) fn write(plan: &Plan, state: &Path) -> Result<()> {
    let folder = state.join("pki");
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let authority_key = KeyPair::generate().context("generating the authority's key")?;
    let authority = authority()?;
    let ca = authority.self_signed(&authority_key).context("signing the authority's certificate")?.pem();
    let issuer = Issuer::new(authority, authority_key);
    private(&folder.join("ca.crt"), &ca)?;
    private(&folder.join("ca.key"), &issuer.key().serialize_pem())?;
    let tokens = KeyPair::generate().context("generating the key of ServiceAccount tokens")?;
    private(&folder.join("service-account.key"), &tokens.serialize_pem())?;
    private(&folder.join("service-account.pub"), &tokens.public_key_pem())?;

    for identity in identities(plan)? {
        let file = identity.file;
        let (certificate, key) =
            issue(identity, &issuer).with_context(|| format!("making the certificate of {file}"))?;
        private(&folder.join(format!("{file}.crt")), &certificate)?;
        private(&folder.join(format!("{file}.key")), &key)?;
        if WITH_KUBECONFIG.iter().any(|component| component.name() == file) {
            private(&folder.join(format!("{file}.kubeconfig")), &plan::kubeconfig(plan, &ca, &certificate, &key))?;
        } else if file == "admin" {
            private(&state.join("kubeconfig"), &plan::kubeconfig(plan, &ca, &certificate, &key))?;
        }
    }
    Ok(())
}

fn authority() -> Result<CertificateParams> {
    let mut params = validity(CertificateParams::default())?;
    params.distinguished_name.push(DnType::CommonName, "ernie local cluster");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    Ok(params)
}

fn issue(identity: Identity, issuer: &Issuer<'_, KeyPair>) -> Result<(String, String)> {
    let mut params = validity(CertificateParams::default())?;
    params.distinguished_name.push(DnType::CommonName, identity.common_name);
    if let Some(organisation) = identity.organisation {
        params.distinguished_name.push(DnType::OrganizationName, organisation);
    }
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    if !identity.served.is_empty() {
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
    }
    params.subject_alt_names = identity.served;
    let key = KeyPair::generate()?;
    Ok((params.signed_by(&key, issuer)?.pem(), key.serialize_pem()))
}

/// Valid from yesterday, for machines whose clocks disagree, to a year from now.
fn validity(mut params: CertificateParams) -> Result<CertificateParams> {
    let today = Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).date();
    let date = |date: jiff::civil::Date| {
        Ok::<_, anyhow::Error>(date_time_ymd(
            date.year().into(),
            u8::try_from(date.month())?,
            u8::try_from(date.day())?,
        ))
    };
    params.not_before = date(today.checked_sub(1.day())?)?;
    params.not_after = date(today.checked_add(365.days())?)?;
    Ok(params)
}

fn private(path: &Path, content: &str) -> Result<()> {
    use std::io::Write;
    let mut file = fs::File::options()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("writing {}", path.display()))?;
    file.write_all(content.as_bytes()).with_context(|| format!("writing {}", path.display()))
}
