//! What every request to the engine says of itself, checked.

use std::{sync::Arc, time::Instant};

use tonic::{Extensions, Status, metadata::MetadataMap};

use super::{
    arrival::Arrival, calls::Taken, connection::LiveCall, deadline, request, served::Served, status::invalid,
    submission::Caller,
};

/// Longest salt of cached prompts, in bytes.
const MAX_SALT_BYTES: usize = 64;

/// The fields that such requests have in common.
pub(super) struct Head {
    pub(super) model: String,
    pub(super) request_id: String,
    pub(super) priority: i32,
    pub(super) cache_salt: String,
}

/// How a call came.
pub(super) struct Call {
    pub(super) metadata: MetadataMap,
    pub(super) live: Option<LiveCall>,
    pub(super) arrival: Option<Arrival>,
    pub(super) taken: Taken,
}

impl Call {
    pub(super) fn new(metadata: MetadataMap, extensions: &Extensions) -> Self {
        let (live, arrival) = (extensions.get().cloned(), extensions.get().cloned());
        Self { metadata, live, arrival, taken: extensions.get().cloned().unwrap_or_default() }
    }
}

/// Who asks for what.
pub(super) struct Entry {
    pub(super) served: Arc<Served>,
    pub(super) caller: Caller,
    /// The name that answers carry.
    pub(super) model: String,
    /// See [`Served::numerics`].
    pub(super) numerics: String,
}

impl Entry {
    /// Checks a request's head; `draw` gives an id.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT`, `NOT_FOUND`.
    pub(super) fn new(
        served: &Arc<Served>,
        tenant: Arc<str>,
        metadata: &MetadataMap,
        head: Head,
        draw: impl FnOnce() -> u64,
    ) -> Result<Self, Status> {
        let accepted = Instant::now();
        let Head { model, request_id, priority, cache_salt } = head;
        let time = deadline::of(metadata)?;
        let asked = served.find(&model)?;
        let (adapter, model, numerics) = (asked.adapter, asked.name.to_owned(), asked.numerics.to_owned());
        let request_id = request::request_id(request_id, draw)?;
        if !(-100..=100).contains(&priority) {
            return Err(invalid("priority", format!("is {priority}; choose from -100 to 100, smaller is sooner")));
        }
        if cache_salt.len() > MAX_SALT_BYTES {
            let sentence = format!("has {} bytes; give at most {MAX_SALT_BYTES}", cache_salt.len());
            return Err(invalid("cache_salt", sentence));
        }
        let (deadline, cache_salt) = (accepted + time, cache_salt.into());
        let caller = Caller { request_id, tenant, cache_salt, priority, deadline, adapter };
        Ok(Self { served: Arc::clone(served), caller, model, numerics })
    }
}
