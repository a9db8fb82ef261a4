//! A chunk's memory while a call with it is under way.

use tandem_memory::Extent;

/// Packed bytes that are being stored. Dropped before the call is answered.
pub(crate) struct Lent(Extent);

impl Lent {
    pub(crate) fn new(extent: Extent) -> Lent {
        Lent(extent)
    }

    #[allow(unsafe_code)] // The one place where bytes to store become a slice.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: whoever called `Tier::store` leaves these bytes as they are until the call is answered, and it is
        // answered after this is dropped (contract point 2).
        unsafe { self.0.bytes() }
    }
}

/// Where packed bytes are being loaded to. Dropped before the call is answered.
pub(crate) struct Room(Extent);

impl Room {
    pub(crate) fn new(extent: Extent) -> Room {
        Room(extent)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    #[allow(unsafe_code)] // The one place where bytes to load become a slice.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: whoever called `Tier::load` leaves these bytes alone until the call is answered, and it is answered
        // after this is dropped (contract point 2). This is the call's only `Room`, and the borrow is exclusive.
        unsafe { self.0.bytes_mut() }
    }
}
