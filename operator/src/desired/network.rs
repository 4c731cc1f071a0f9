//! The NetworkPolicy of a model: pods of the cluster reach the inference and HTTP ports, nothing else is reachable (the
//! administration port above all), and a worker opens no connection: its model is mounted by the kubelet.

use ernie_proto::contract::{GRPC_PORT, HTTP_PORT};
use k8s_openapi::api::networking::v1::{
    NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;

use super::names;
use crate::api::ErnieModel;

pub(super) fn policy(model: &ErnieModel) -> NetworkPolicy {
    let port = |number: u16| NetworkPolicyPort {
        port: Some(IntOrString::Int(i32::from(number))),
        protocol: Some("TCP".to_owned()),
        end_port: None,
    };
    let any_namespace =
        NetworkPolicyPeer { namespace_selector: Some(LabelSelector::default()), ..NetworkPolicyPeer::default() };
    NetworkPolicy {
        metadata: names::metadata(model, model.name_any()),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(names::pod_selector(model)),
            policy_types: Some(vec!["Ingress".to_owned(), "Egress".to_owned()]),
            ingress: Some(vec![NetworkPolicyIngressRule {
                from: Some(vec![any_namespace]),
                ports: Some(vec![port(GRPC_PORT), port(HTTP_PORT)]),
            }]),
            egress: Some(Vec::new()),
        }),
    }
}
