//! See `tandem_fuzz::immediate`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tandem_fuzz::immediate(input));
