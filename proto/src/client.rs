//! What Rust clients of the services need beside the generated code.

use std::error::Error;

use tonic::Status;

/// Whether a call failed because its connection went away before the server had looked at the call: sending it again repeats
/// nothing. Servers ask old connections to go away; tonic, unlike other gRPC libraries, leaves the second attempt to its
/// caller. `status` is that of the call, not one that ended its stream.
#[must_use]
pub fn never_sent(status: &Status) -> bool {
    let mut cause = Error::source(status);
    while let Some(error) = cause {
        if error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_canceled) {
            return true;
        }
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            return error.is_remote()
                && match error.reason() {
                    // Streams that the server has begun go on after such a frame; RFC 9113, 6.8.
                    Some(h2::Reason::NO_ERROR) => error.is_go_away(),
                    Some(reason) => reason == h2::Reason::REFUSED_STREAM,
                    None => false,
                };
        }
        cause = error.source();
    }
    false
}
