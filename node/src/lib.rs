//! What prefill and decode nodes share: their place in the cluster, and how their loop waits.
//!
//! A node is one thread that computes and never blocks, and a runtime that owns the sockets. This crate is the
//! seam between the two: events come in through an [`Inbox`], messages leave through a [`Cluster`] (a [`Member`]
//! of a real one, or a simulation), and [`Clock`] gives the loop the time that `tandem-proto` takes as an argument.
//!
//! What the loop shows of itself on its [`Board`], and what the transport counts, is served over HTTP.
//!
//! It knows nothing of prompts or tokens; [`start`] puts the parts of a node together.
#![forbid(unsafe_code)]

mod board;
mod cache;
mod clock;
mod cluster;
mod conversions;
mod device;
mod inbox;
mod load;
mod member;
mod router;
mod start;
mod status;
mod warm;

pub use board::{Board, CacheShown, ReusedTokens, Shown};
pub use clock::{Clock, ClockHand};
pub use cluster::{Cluster, SendError, lane};
pub use conversions::Conversions;
pub use device::Device;
pub use inbox::{Inbox, InboxSender, Next, NodeEvent, Unpark, inbox};
pub use member::Member;
pub use router::RouterLink;
pub use start::{NodeLoop, NodeOptions, Parts, start};
pub use status::StatusAddr;
