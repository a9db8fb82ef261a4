//! HTTP connections: how they are accepted, bounded, and let go when the process ends.

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};

/// How long a client may take to send a request's head, or to keep a connection without a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(75);
/// How long a connection may take to end once its last request has.
pub const FAREWELL: Duration = Duration::from_secs(2);
/// How long to wait when no connection can be accepted, as when files run out.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// The connections of one listener.
pub struct Connections {
    places: Arc<Semaphore>,
    limit: u32,
    close: watch::Sender<bool>,
}

impl Connections {
    /// At most so many at once; further ones wait in the system's queue.
    #[must_use]
    pub fn new(limit: u32) -> Connections {
        Connections {
            places: Arc::new(Semaphore::new(limit as usize)),
            limit,
            close: watch::channel(false).0,
        }
    }

    /// Accepts, and answers by `routes`, as long as it is polled.
    pub async fn accept(&self, listener: &TcpListener, routes: &axum::Router) {
        loop {
            // Nothing closes this semaphore.
            let Ok(permit) = self.places.clone().acquire_owned().await else { return };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    sleep(ACCEPT_BACKOFF).await;
                    continue;
                }
            };
            let (service, close) = (TowerToHyperService::new(routes.clone()), self.close.subscribe());
            tokio::spawn(async move {
                converse(stream, service, close).await;
                drop(permit);
            });
        }
    }

    /// Ends the connections as soon as they have answered what they were asked, and waits [`FAREWELL`] for that.
    pub async fn end(self) {
        self.close.send_replace(true);
        if timeout(FAREWELL, self.places.acquire_many(self.limit)).await.is_err() {
            tracing::debug!("connections were cut off");
        }
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
