//! Lanes over RDMA verbs.
pub(crate) mod verbs;
