//! What every Tandem process does around its work: options, logs, signals and its TLS identity.
//!
//! One struct per binary derives [`clap::Parser`] and holds plain typed fields with defaults. [`parse`] fills
//! it from flags, then the environment, then a TOML file, then the defaults: a value is written in one place
//! and checked by one parser wherever it comes from.
//!
//! - [`options`]: [`parse`], and the flags that all binaries share, [`ProcessOptions`].
//! - [`units`]: durations and sizes as people write them.
//! - [`logs`]: structured logs on standard error.
//! - [`http`] and [`exposition`]: connections of an HTTP endpoint, and metrics as Prometheus reads them.
//! - [`shutdown`]: a first signal asks to drain, a second one ends the process.
//! - [`tls`]: the flags that say who this process is to its peers.
//!
//! It never decides what a process does: there is no framework here, only pieces that `main` puts together.
#![forbid(unsafe_code)]

pub mod exposition;
pub mod http;
pub mod logs;
pub mod options;
pub mod shutdown;
pub mod tls;
pub mod units;

pub use logs::LogFormat;
pub use options::{OptionsError, ProcessOptions, parse};
pub use shutdown::Shutdown;
pub use tls::TlsOptions;
