//! The contract of `Transport`, run against every backend. A new backend is one file, which builds a
//! [`suite::Cluster`], and one line here.

mod quic;
mod sim;
mod suite;

contract!(sim_steady, crate::sim::Steady);
contract!(sim_rough, crate::sim::Rough);
contract!(quic_single, crate::quic::Single);
contract!(quic_threaded, crate::quic::Threaded);
contract!(quic_small_packets, crate::quic::SmallPackets);
