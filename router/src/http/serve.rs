//! Serves requests, and lets them finish when the process is asked to end.

use super::App;
use std::sync::Arc;
use std::time::Duration;
use tandem_process::Shutdown;
use tandem_process::http::{Connections, FAREWELL};
use tokio::net::TcpListener;
use tokio::time::timeout;

/// How connections are served.
#[derive(Clone, Copy, Debug)]
pub struct ServeOptions {
    /// Connections at once; further ones wait in the system's queue.
    pub max_connections: usize,
    /// How long running requests may take to finish once `shutdown` is requested.
    pub drain_timeout: Duration,
}

/// Serves until `shutdown` is requested and running requests have finished, or their time is over.
pub async fn serve(listener: TcpListener, app: Arc<App>, options: ServeOptions, shutdown: Shutdown) {
    let connections = Connections::new(options.max_connections as u32);
    let routes = app.router();
    // While it drains, it still accepts: load balancers have to see that it is not ready.
    let draining = async {
        shutdown.requested().await;
        app.drain();
        if timeout(options.drain_timeout, app.idle()).await.is_err() {
            tracing::warn!(waited = ?options.drain_timeout, "cutting off requests that are still running");
            app.cut();
            let _ = timeout(FAREWELL, app.idle()).await;
        }
    };
    tokio::select! {
        () = connections.accept(&listener, &routes) => {}
        () = draining => {}
    }
    connections.end().await;
}
