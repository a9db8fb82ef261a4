//! Places for tests.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// A folder that goes with the test.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new() -> Folder {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let own = format!("tandem-remote-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(own);
        std::fs::create_dir_all(&path).expect("a folder for tests");
        Folder(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What stays is in the system's folder of temporary things.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The URL of a server that `scripts/stores` has started.
pub(crate) fn from_environment(name: &str) -> Option<String> {
    let url = std::env::var(name).ok().filter(|url| !url.is_empty());
    if url.is_none() {
        println!("skipped: {name} is not set: run with scripts/stores");
    }
    url
}
