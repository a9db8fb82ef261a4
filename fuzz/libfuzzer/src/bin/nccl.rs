//! See `tandem_fuzz::targets`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tandem_fuzz::play("nccl", input));
