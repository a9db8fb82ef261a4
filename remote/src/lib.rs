//! The tier of stored chunks that lies in a store of somebody else's: S3 and what speaks like it, Redis or Valkey, or a
//! directory that several hosts mount.
//!
//! - [`Remote`]: the [`Tier`](tandem_kv_store::tier::Tier), over OpenDAL, or over a client of its own for Redis. Its
//!   work is done on threads of its own; callers never wait.
//! - [`StoreUrl`]: which store, as it is written in options.
//!
//! A chunk is one object, header and packed bytes, under a name made of its key. Nothing that a store sends is believed:
//! an object is read into memory that was given for it and no further, and its header says whether it is the chunk.
//!
//! How much a store keeps and for how long is its own business: lifecycle rules of a bucket, `maxmemory` of Redis. So
//! this tier has no budget, evicts nothing, and pins nothing.
#![deny(unsafe_code)]

mod breaker;
mod landing;
mod lent;
mod place;
mod tier;
mod url;

pub use tier::{OpenError, Remote, RemoteConfig};
pub use url::{Secret, StoreUrl, UrlError};
