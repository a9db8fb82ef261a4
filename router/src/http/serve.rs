//! Accepts connections, and lets them go when the process is asked to end.

use super::App;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tandem_process::Shutdown;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};

/// How long a client may take to send a request's head, or to keep a connection without a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(75);
/// How long a connection may take to end once its last request has.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long to wait when no connection can be accepted, as when files run out.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

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
    let connections = Arc::new(Semaphore::new(options.max_connections));
    let (close, _) = watch::channel(false);
    let accepting = accept(&listener, &app, &connections, &close);
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
        () = accepting => {}
        () = draining => {}
    }
    close.send_replace(true);
    let all = connections.acquire_many(options.max_connections as u32);
    if timeout(FAREWELL, all).await.is_err() {
        tracing::debug!("connections were cut off");
    }
}

async fn accept(
    listener: &TcpListener,
    app: &Arc<App>,
    connections: &Arc<Semaphore>,
    close: &watch::Sender<bool>,
) {
    let router = app.router();
    loop {
        // Nothing closes this semaphore.
        let Ok(permit) = connections.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                sleep(ACCEPT_BACKOFF).await;
                continue;
            }
        };
        let (service, close) = (TowerToHyperService::new(router.clone()), close.subscribe());
        tokio::spawn(async move {
            converse(stream, service, close).await;
            drop(permit);
        });
    }
}

async fn converse(
    stream: TcpStream,
    service: TowerToHyperService<axum::Router>,
    mut close: watch::Receiver<bool>,
) {
    // Tokens are small and must not wait for each other.
    let _ = stream.set_nodelay(true);
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let closing = async {
        let _ = close.wait_for(|close| *close).await;
    };
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = closing => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}
