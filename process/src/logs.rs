//! Structured logs on standard error; standard output stays free for what a command prints.

use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum LogFormat {
    /// One line for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Why logging could not start.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter has no meaning.
    #[error(
        "--log-level is `{filter}`: {cause}; use a level such as info, or directives such as info,router=debug"
    )]
    Filter {
        /// The filter.
        filter: String,
        /// What is wrong with it.
        cause: String,
    },
    /// Logging runs already.
    #[error("logs were started before: {0}")]
    Started(String),
}

/// Starts logging for this process, panics included.
///
/// # Errors
/// When `filter` has no meaning, or logging runs already.
pub fn start(format: LogFormat, filter: &str) -> Result<(), LogError> {
    let parsed = EnvFilter::try_new(filter)
        .map_err(|e| LogError::Filter { filter: filter.to_owned(), cause: e.to_string() })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(parsed)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let started = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    started.map_err(|e| LogError::Started(e.to_string()))?;
    // A panic must reach the collector as a record, not as loose lines between records.
    std::panic::set_hook(Box::new(|panic| {
        let trace = std::backtrace::Backtrace::capture();
        tracing::error!(thread = std::thread::current().name(), %panic, backtrace = %trace, "panicked");
    }));
    Ok(())
}
