//! See `tandem_transport::decode_anything`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tandem_transport::decode_anything(input));
