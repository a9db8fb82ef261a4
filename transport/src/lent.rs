//! Source bytes while a write of them is under way.

use tandem_memory::Extent;

/// A source that the node lent to the transport. Dropped, or at least never read again, before the write's
/// ticket is reported.
pub(crate) struct Lent(pub(crate) Extent);

impl AsRef<[u8]> for Lent {
    #[allow(unsafe_code)] // The one place where source memory becomes a slice.
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the submitter promised (contract point 2) not to change these bytes before the write's
        // report, and every backend reports only when it will not read them again.
        unsafe { self.0.bytes() }
    }
}
