//! The router: an OpenAI endpoint in front of prefill and decode nodes.
//!
//! It tokenizes, pairs each request with a prefill and a decode node, tells both at once, and puts their
//! tokens together into one answer. It never sees weights or KV, and holds no state that outlives it: nodes
//! find it again and introduce themselves.
//!
//! - [`openai`]: the API's types, and every rule about what a request may hold.
//! - [`requests`]: one request's life as a state machine: messages in, text out.
//! - [`membership`], [`placement`]: who is there, and who computes what; pure, like the two above.
//! - [`dispatch`]: connects requests with nodes over the control channel.
//! - [`http`], [`sse`]: the endpoint itself.
//! - [`metrics`]: what Prometheus reads.
#![forbid(unsafe_code)]

pub mod dispatch;
pub mod http;
pub mod membership;
pub mod metrics;
pub mod openai;
pub mod placement;
pub mod requests;
pub mod sse;
