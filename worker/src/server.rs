//! gRPC: protobuf to engine and back. Knows no tensor.
//!
//! - [`connection`]: accepting, limits, ageing; [`calls`]: what every call passes through; `arrival`: what requests may
//!   hold until the engine has them;
//! - [`Inference`]: `ernie.v1`. `entry`, `request`, `conversation`, `generation` and `constraint` check what comes in; `prompt` and
//!   `submission` take it to the engine, and `resume` takes an answer up where it was cut off; `answer`, `choice` and `text`
//!   stream what comes back; `score` and `embed` have prompts read by way of `reading`;
//! - [`lifecycle`]: the stage that probes, health and shutdown watch.

pub mod calls;
pub mod connection;
pub mod deadline;
pub mod lifecycle;
pub mod status;

mod answer;
mod arrival;
mod choice;
mod constraint;
mod conversation;
mod embed;
mod entry;
mod generation;
mod health;
mod inference;
mod prompt;
mod reading;
mod request;
mod resume;
mod score;
mod served;
mod submission;
mod text;

use ernie_proto::ernie::v1::inference_server::InferenceServer;
use tonic::service::Routes;

pub use answer::AnswerStream;
pub use arrival::{ARRIVING_BYTES, TextBudget};
pub use inference::{Inference, WARM_UP_KEY};
pub use served::{Served, ServedAdapter};

use calls::MAX_REQUEST_BYTES;
use lifecycle::Lifecycle;

/// Largest message of a reflection stream, in bytes: a name. These streams are bounded by connections only.
const MAX_REFLECTION_BYTES: usize = 4 << 10;

/// All services of the port, and the descriptor sets that describe them. A task keeps the health service at the
/// lifecycle's stage.
///
/// # Errors
/// A sentence when the descriptors built into this binary cannot be read: a defect.
pub async fn services(
    inference: Inference,
    lifecycle: &Lifecycle,
    reflection: bool,
) -> Result<(Routes, Vec<&'static [u8]>), String> {
    let service = InferenceServer::new(inference).max_decoding_message_size(MAX_REQUEST_BYTES);
    let mut descriptors = vec![ernie_proto::FILE_DESCRIPTOR_SET, tonic_health::pb::FILE_DESCRIPTOR_SET];
    let mut routes = Routes::new(service).add_service(health::service(lifecycle).await);
    if reflection {
        let describe = || {
            let builder = tonic_reflection::server::Builder::configure();
            descriptors.iter().fold(builder, |builder, set| builder.register_encoded_file_descriptor_set(set))
        };
        let broken =
            |error: tonic_reflection::server::Error| format!("the service descriptors cannot be read: {error}");
        let (v1, v1alpha) = (describe().build_v1().map_err(broken)?, describe().build_v1alpha().map_err(broken)?);
        let (v1, v1alpha) = (
            v1.max_decoding_message_size(MAX_REFLECTION_BYTES),
            v1alpha.max_decoding_message_size(MAX_REFLECTION_BYTES),
        );
        routes = routes.add_service(v1).add_service(v1alpha);
        descriptors.push(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET);
        descriptors.push(tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET);
    }
    Ok((routes, descriptors))
}

/// How many calls may be arriving at once: what the engine takes, and some more for other methods.
pub fn arriving(max_num_seqs: usize, max_queued_requests: usize) -> usize {
    max_num_seqs + max_queued_requests + 64
}
