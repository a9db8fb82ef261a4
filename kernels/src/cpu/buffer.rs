//! Aligned memory for activations, packed weights and scratch.

use super::element::Element;
use tandem_memory::{Extent, HostRegion};

/// Aligned, zeroed memory that only grows, in huge pages where the system has them.
pub(crate) struct Buffer {
    /// Nobody else holds this extent, so borrows of `self` govern its bytes.
    storage: Option<Extent>,
}

impl Buffer {
    pub(crate) const fn new() -> Buffer {
        Buffer { storage: None }
    }

    /// Makes room for `count` of `T`. What was there is lost when it has to grow.
    ///
    /// # Panics
    /// When the system is out of memory, as `Vec` does.
    pub(crate) fn reserve<T: Element>(&mut self, count: usize) -> &mut [T] {
        let bytes = count.checked_mul(size_of::<T>()).expect("a buffer fits the address space");
        if self.storage.as_ref().is_none_or(|s| s.len() < bytes) {
            self.storage = None;
            let region =
                HostRegion::private(bytes.next_power_of_two().max(4096)).expect("memory for a buffer");
            let len = region.len();
            self.storage = Some(region.extent(0..len).expect("a region contains itself"));
        }
        self.slice_mut(count)
    }

    /// The first `count` of `T`.
    ///
    /// # Panics
    /// When that much was not reserved.
    pub(crate) fn slice<T: Element>(&self, count: usize) -> &[T] {
        let Some(storage) = &self.storage else {
            assert_eq!(count, 0);
            return &[];
        };
        assert!(count * size_of::<T>() <= storage.len());
        // SAFETY: the memory is page-aligned, initialised (it starts zeroed), long enough, valid as any
        // element whatever its bits, and ours alone; writing it takes `&mut self`.
        unsafe { std::slice::from_raw_parts(storage.bytes().as_ptr().cast(), count) }
    }

    /// Its first byte's address, to compute with: nothing is promised about what lies there.
    pub(crate) fn start(&self) -> *const u8 {
        match &self.storage {
            // SAFETY: the slice is not kept, and nobody writes while `self` is borrowed.
            Some(storage) => unsafe { storage.bytes() }.as_ptr(),
            None => std::ptr::null(),
        }
    }

    /// As [`Buffer::slice`], to write.
    pub(crate) fn slice_mut<T: Element>(&mut self, count: usize) -> &mut [T] {
        let Some(storage) = &self.storage else {
            assert_eq!(count, 0);
            return &mut [];
        };
        assert!(count * size_of::<T>() <= storage.len());
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(storage.bytes_mut().as_mut_ptr().cast(), count) }
    }
}

/// Activations: rows of f32, one for each token.
pub struct Rows {
    buffer: Buffer,
    rows: usize,
    width: usize,
}

impl Default for Rows {
    fn default() -> Rows {
        Rows { buffer: Buffer::new(), rows: 0, width: 0 }
    }
}

impl Rows {
    /// Takes another size. What the rows hold then is undefined (but initialised): every operation that
    /// takes rows to write sets all of them.
    pub fn reshape(&mut self, rows: usize, width: usize) {
        self.buffer.reserve::<f32>(rows * width);
        (self.rows, self.width) = (rows, width);
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Numbers of a row.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// All numbers, row after row.
    #[must_use]
    pub fn data(&self) -> &[f32] {
        self.buffer.slice(self.rows * self.width)
    }

    /// All numbers, to write.
    #[must_use]
    pub fn data_mut(&mut self) -> &mut [f32] {
        self.buffer.slice_mut(self.rows * self.width)
    }

    /// Row `index`.
    ///
    /// # Panics
    /// When there is no such row.
    #[must_use]
    pub fn row(&self, index: usize) -> &[f32] {
        &self.data()[index * self.width..][..self.width]
    }
}

/// A pointer that tasks of one loop share, each for a part of its own.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(*mut T);

// SAFETY: whoever dereferences it says why its part is nobody else's.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(slice: &mut [T]) -> Shared<T> {
        Shared(slice.as_mut_ptr())
    }

    pub(crate) fn get(self) -> *mut T {
        self.0
    }
}
