//! Conversions between pages and packed KV that a node began, and what each is of.

use std::collections::HashMap;
use tandem_kernels::{Converted, Kernels, PackError, Ticket};
use tandem_proto::ids::Time;

/// How long a loop waits at most while layers are packed or scattered: a GPU wakes nobody when it is done.
const POLL_US: u64 = 50;

/// What a node's kernels are doing. `T` says what a conversion is of.
pub struct Conversions<K: Kernels, T> {
    kernels: K,
    under_way: HashMap<Ticket, T>,
    next_ticket: u64,
    converted: Vec<Converted>,
    /// Why none will be over any more.
    failure: Option<K::Error>,
}

impl<K: Kernels, T> Conversions<K, T> {
    /// None yet.
    #[must_use]
    pub fn new(kernels: K) -> Conversions<K, T> {
        Conversions {
            kernels,
            under_way: HashMap::new(),
            next_ticket: 0,
            converted: Vec::new(),
            failure: None,
        }
    }

    /// Has `begin` begin one, under the ticket that it is given.
    ///
    /// # Errors
    /// When that was refused: gives back what it was of, and says why.
    pub fn begin(
        &mut self,
        of: T,
        begin: impl FnOnce(&mut K, Ticket) -> Result<(), PackError>,
    ) -> Result<(), (T, PackError)> {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        match begin(&mut self.kernels, ticket) {
            Ok(()) => {
                self.under_way.insert(ticket, of);
                Ok(())
            }
            Err(error) => Err((of, error)),
        }
    }

    /// Tells what is over, with its checksum. False if the device failed: then nothing will be any more.
    #[must_use]
    pub fn poll(&mut self, mut over: impl FnMut(T, u64)) -> bool {
        if let Err(error) = self.kernels.poll(&mut self.converted) {
            tracing::error!(%error, "layers cannot be converted; stopping");
            self.failure = Some(error);
        }
        for Converted { ticket, checksum } in self.converted.drain(..) {
            if let Some(of) = self.under_way.remove(&ticket) {
                over(of, checksum);
            }
        }
        self.failure.is_none()
    }

    /// Conversions that are not over.
    #[must_use]
    pub fn under_way(&self) -> usize {
        self.under_way.len()
    }

    /// When to look again, if any is under way.
    #[must_use]
    pub fn next_poll(&self, now: Time) -> Option<Time> {
        (!self.under_way.is_empty()).then(|| now.after_us(POLL_US))
    }

    /// Why the node cannot go on, if it cannot.
    ///
    /// # Errors
    /// When the device failed.
    pub fn result(self) -> anyhow::Result<()> {
        self.failure
            .map_or(Ok(()), |error| Err(anyhow::Error::new(error).context("layers cannot be converted")))
    }
}
