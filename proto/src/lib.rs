//! What the processes of the system agree on.
//!
//! - [`ernie::v1`]: the gRPC services that clients call, generated from `proto/ernie/v1/*.proto`;
//! - [`contract`]: ports, paths, labels, annotations and metric names;
//! - [`failure`]: the reasons with which a worker gives up, their exit codes and the termination message;
//! - [`client`]: what Rust clients need beside the generated code.

pub mod client;
pub mod contract;
pub mod failure;

/// Generated protobuf packages.
pub mod ernie {
    /// Chat-level inference.
    #[allow(missing_docs, unreachable_pub, clippy::all)]
    pub mod v1 {
        tonic::include_proto!("ernie.v1");
    }
}

/// The encoded `FileDescriptorSet` of all packages, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor.bin"));
