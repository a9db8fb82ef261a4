//! Files as memory.
#![allow(unsafe_code)]

use memmap2::Mmap;
use std::fs::File;
use std::path::Path;

/// Maps a whole file, to read.
pub(crate) fn map(path: &Path) -> std::io::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: the mapping is read while a model loads and is gone afterwards: everything kept is a copy. A
    // file that another process changes meanwhile gives other numbers, and one that it shortens ends this
    // process; both are what changing a model under a loader does anywhere.
    unsafe { Mmap::map(&file) }
}
