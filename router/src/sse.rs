//! Server-sent events, written to a client that may be slow or gone.

use axum::body::Body;
use bytes::Bytes;
use futures_core::Stream;
use serde::Serialize;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::mpsc;

/// Events that wait for the client, each with the tokens of one message from a node. Beyond the socket's own
/// buffer, this is all that is kept for it.
const WAITING: usize = 16;

/// The end of a stream that events are written to.
#[derive(Debug)]
pub struct EventSender {
    sender: mpsc::Sender<Bytes>,
    patience: Duration,
}

/// The client takes nothing more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unsent {
    /// It went away.
    #[error("the client went away")]
    Gone,
    /// It did not read for too long.
    #[error("the client did not read for too long")]
    Slow,
}

/// A stream of events, and the body that carries it to the client. A client that does not read for
/// `patience` is given up.
pub fn channel(patience: Duration) -> (EventSender, Body) {
    let (sender, receiver) = mpsc::channel(WAITING);
    (EventSender { sender, patience }, Body::from_stream(Events(receiver)))
}

impl EventSender {
    /// Sends `data` as one event.
    ///
    /// # Errors
    /// When the client takes nothing more.
    pub async fn send(&self, data: &impl Serialize) -> Result<(), Unsent> {
        let mut event = b"data: ".to_vec();
        // The types that are sent hold nothing that JSON cannot; a failure would end the stream, as it must.
        serde_json::to_writer(&mut event, data).map_err(|_| Unsent::Gone)?;
        event.extend_from_slice(b"\n\n");
        self.put(event.into()).await
    }

    /// Sends OpenAI's last event.
    ///
    /// # Errors
    /// When the client takes nothing more.
    pub async fn done(&self) -> Result<(), Unsent> {
        self.put(Bytes::from_static(b"data: [DONE]\n\n")).await
    }

    /// Waits until the client is gone.
    pub async fn closed(&self) {
        self.sender.closed().await;
    }

    async fn put(&self, event: Bytes) -> Result<(), Unsent> {
        match self.sender.send_timeout(event, self.patience).await {
            Ok(()) => Ok(()),
            Err(mpsc::error::SendTimeoutError::Closed(_)) => Err(Unsent::Gone),
            Err(mpsc::error::SendTimeoutError::Timeout(_)) => Err(Unsent::Slow),
        }
    }
}

struct Events(mpsc::Receiver<Bytes>);

impl Stream for Events {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context).map(|event| event.map(Ok))
    }
}
