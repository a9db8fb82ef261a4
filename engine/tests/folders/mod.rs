//! Model folders that a test makes and changes.
#![allow(dead_code, unreachable_pub)] // Each test binary uses a part.

use serde_json::{Map, Value};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use tandem_engine::{CpuEngine, LoadError, LoadOptions};

/// The folder with one small random model of every family.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// A copy of a fixture, gone when dropped.
pub struct Folder(PathBuf);

impl Folder {
    pub fn copy_of(fixture: &str) -> Folder {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("folder-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let folder = Folder(Path::new(env!("CARGO_TARGET_TMPDIR")).join(name));
        std::fs::create_dir_all(&folder.0).expect("a temporary folder");
        for entry in std::fs::read_dir(fixtures().join(fixture)).expect("the fixture") {
            let entry = entry.expect("an entry");
            std::fs::copy(entry.path(), folder.0.join(entry.file_name())).expect("a copy");
        }
        folder
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.0.join(file)
    }

    pub fn read(&self, file: &str) -> Vec<u8> {
        std::fs::read(self.path(file)).expect("a file of the folder")
    }

    pub fn write(&self, file: &str, bytes: &[u8]) {
        std::fs::write(self.path(file), bytes).expect("a file of the folder");
    }

    /// Changes a JSON file.
    pub fn edit(&self, file: &str, change: impl FnOnce(&mut Map<String, Value>)) {
        let mut json: Map<String, Value> = serde_json::from_slice(&self.read(file)).expect("JSON");
        change(&mut json);
        self.write(file, &serde_json::to_vec(&json).expect("JSON"));
    }

    pub fn load(&self) -> Result<CpuEngine, LoadError> {
        CpuEngine::load(&self.0, LoadOptions { threads: 1, ..LoadOptions::default() })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left of a folder in the build's own temporary directory harms nobody.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
