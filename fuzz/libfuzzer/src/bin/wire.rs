//! See `tandem_fuzz::wire_message`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tandem_fuzz::wire_message(input));
