//! Regions whose true bytes are on a GPU. Most lanes read and write the host's side of them: so a source is fetched
//! before its write is handed to such a lane, here, and what has landed is deposited before it is reported
//! ([`crate::window::Landing::deposit`]).

#[cfg(feature = "cuda")]
mod fetch;

#[cfg(feature = "cuda")]
pub(crate) use fetch::{Fetches, must_fetch, pieces};

/// Without GPUs no source is fetched.
#[cfg(not(feature = "cuda"))]
#[derive(Default)]
pub(crate) struct Fetches {}

#[cfg(not(feature = "cuda"))]
impl Fetches {
    pub(crate) fn start(&self, _node: &std::sync::Arc<crate::net::node::Node>) -> std::io::Result<()> {
        Ok(())
    }

    pub(crate) fn wait(&self) {}

    pub(crate) fn stop(&self) {}
}
