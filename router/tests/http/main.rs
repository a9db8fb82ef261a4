//! The router over HTTP, with nodes that do as each test says, over the real control channel.

mod endpoint;
mod failures;
mod support;
