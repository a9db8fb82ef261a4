//! The contract of `Transport`, run against every backend. A new backend is one file, which builds a
//! [`suite::Cluster`], and one line here.

#[path = "../members/mod.rs"]
mod members;
mod net;
mod sim;
mod suite;

contract!(sim_steady, crate::sim::Steady);
contract!(sim_rough, crate::sim::Rough);
contract!(quic_single, crate::net::Quic);
contract!(quic_threaded, crate::net::QuicThreaded);
contract!(quic_small_packets, crate::net::QuicSmallPackets);
contract!(shm, crate::net::Shm);
contract!(tls, crate::net::Tls);
contract!(tls_many, crate::net::TlsMany);
#[cfg(feature = "rdma")]
contract!(rdma_one_device, crate::net::RdmaOne);
#[cfg(feature = "rdma")]
contract!(rdma_two_devices, crate::net::RdmaTwo);
#[cfg(feature = "cuda")]
contract!(cuda_ipc, crate::net::CudaIpc);
#[cfg(feature = "cuda")]
contract!(cuda_nccl, crate::net::Nccl);
#[cfg(feature = "cuda")]
contract!(cuda_shm, crate::net::ShmTwins);
#[cfg(feature = "cuda")]
contract!(cuda_tls, crate::net::TlsTwins);
#[cfg(feature = "cuda")]
contract!(cuda_quic, crate::net::QuicTwins);
contract!(best, crate::net::Best);
