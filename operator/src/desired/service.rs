//! The Services of a model: one address for clients, and the workers one by one for clients that balance themselves.

use ernie_proto::contract::{GRPC_PORT, GRPC_PORT_NAME, HTTP_PORT, HTTP_PORT_NAME};
use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;

use super::names;
use crate::api::ErnieModel;

/// Service NAME.
pub(super) fn service(model: &ErnieModel) -> Service {
    Service { metadata: names::metadata(model, model.name_any()), spec: Some(spec(model)), status: None }
}

/// Service NAME-workers: headless, ready workers only.
pub(super) fn workers(model: &ErnieModel) -> Service {
    let spec =
        ServiceSpec { cluster_ip: Some("None".to_owned()), publish_not_ready_addresses: Some(false), ..spec(model) };
    Service { metadata: names::metadata(model, names::workers_name(model)), spec: Some(spec), status: None }
}

fn spec(model: &ErnieModel) -> ServiceSpec {
    ServiceSpec {
        type_: Some("ClusterIP".to_owned()),
        selector: Some(names::service_labels(model)),
        ports: Some(vec![
            port(GRPC_PORT_NAME, GRPC_PORT, Some("kubernetes.io/h2c")),
            port(HTTP_PORT_NAME, HTTP_PORT, Some("http")),
        ]),
        ..ServiceSpec::default()
    }
}

fn port(name: &str, number: u16, protocol: Option<&str>) -> ServicePort {
    ServicePort {
        name: Some(name.to_owned()),
        port: i32::from(number),
        protocol: Some("TCP".to_owned()),
        target_port: Some(IntOrString::String(name.to_owned())),
        app_protocol: protocol.map(str::to_owned),
        ..ServicePort::default()
    }
}
