//! The worker's first request: one token, asked through its own gRPC port like any client would.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use ernie_proto::{
    ernie::v1::{
        CompleteRequest, SamplingParams, TokenIds, complete_request::Prompt, generate_response::Event,
        inference_client::InferenceClient,
    },
    failure::{Reason, TerminationMessage},
};
use tonic::{Request, Status, metadata::AsciiMetadataValue, transport::Endpoint};

use super::failure;
use crate::server::WARM_UP_KEY;

/// How long the first token may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// Asks for a token.
///
/// # Errors
/// The message of a worker that cannot serve.
pub(super) async fn ask(address: SocketAddr, secret: &str) -> Result<(), TerminationMessage> {
    let asked = tokio::time::timeout(PATIENCE, token(address, secret)).await;
    let asked = asked.unwrap_or_else(|_| Err(format!("no token within {} s", PATIENCE.as_secs())));
    asked.map_err(|sentence| {
        failure(Reason::Internal, format!("the worker asked itself for a token and failed: {sentence}"))
    })
}

async fn token(address: SocketAddr, secret: &str) -> Result<(), String> {
    let endpoint =
        Endpoint::from_shared(format!("http://{}", reachable(address))).map_err(|error| error.to_string())?;
    let channel = endpoint.connect().await.map_err(|error| error.to_string())?;
    let mut request = Request::new(CompleteRequest {
        prompt: Some(Prompt::Tokens(TokenIds { ids: vec![1] })),
        sampling: Some(SamplingParams {
            temperature: Some(0.0),
            max_tokens: Some(1),
            ignore_eos: true,
            ..Default::default()
        }),
        request_id: "warm-up".to_owned(),
        ..Default::default()
    });
    let secret = AsciiMetadataValue::try_from(secret).map_err(|error| error.to_string())?;
    request.metadata_mut().insert(WARM_UP_KEY, secret);
    let said = |status: Status| format!("{:?}: {}", status.code(), status.message());
    let mut stream = InferenceClient::new(channel).complete(request).await.map_err(said)?.into_inner();
    while let Some(message) = stream.message().await.map_err(said)? {
        if matches!(message.event, Some(Event::Done(_))) {
            return Ok(());
        }
    }
    Err("the stream ended early".to_owned())
}

/// The address at which a process reaches a port that it listens on.
fn reachable(address: SocketAddr) -> SocketAddr {
    let host = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        // A socket for both families is reached through the one that every machine has.
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip == Ipv6Addr::LOCALHOST => ip.into(),
        ip => ip,
    };
    SocketAddr::new(host, address.port())
}
