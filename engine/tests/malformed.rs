//! Truncated and flipped files never panic: they load, or are refused.

mod folders;

use folders::Folder;
use proptest::prelude::*;

/// The header of a safetensors file, where flipped bytes mean something.
fn header(bytes: &[u8]) -> usize {
    8 + u64::from_le_bytes(*bytes.first_chunk().expect("a length")) as usize
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn truncated(part in 0.0f64..1.0, in_header: bool) {
        let folder = Folder::copy_of("llama2");
        let bytes = folder.read("model.safetensors");
        let end = if in_header { header(&bytes) } else { bytes.len() };
        folder.write("model.safetensors", &bytes[..(part * end as f64) as usize]);
        prop_assert!(folder.load().is_err());
    }

    #[test]
    fn flipped(flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..6), file in 0usize..4) {
        let (fixture, name) = [
            ("llama2", "model.safetensors"),
            ("llama2", "config.json"),
            ("qwen2-window", "config.json"),
            ("qwen3-sharded", "model.safetensors.index.json"),
        ][file];
        let folder = Folder::copy_of(fixture);
        let mut bytes = folder.read(name);
        let end = if file == 0 { header(&bytes) } else { bytes.len() };
        for (index, bit) in flips {
            bytes[index.index(end)] ^= 1 << bit;
        }
        folder.write(name, &bytes);
        // Most are refused; a flip in a name that nothing reads may load.
        if let Err(error) = folder.load() {
            prop_assert!(!error.to_string().is_empty());
        }
    }

    #[test]
    fn any_header(text in "\\PC{0,200}", length in prop::option::of(any::<u64>())) {
        let folder = Folder::copy_of("llama2");
        let mut bytes = length.unwrap_or(text.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(text.as_bytes());
        folder.write("model.safetensors", &bytes);
        prop_assert!(folder.load().is_err());
    }
}
