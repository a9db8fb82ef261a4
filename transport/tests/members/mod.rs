//! The nodes of one cluster, as tests number them. Each has a certificate of its own.

use std::sync::LazyLock;
use tandem_proto::ids::NodeId;
use tandem_transport::Identity;

const MEMBERS: usize = 8;

/// In the order of their ids.
static ALL: LazyLock<[Identity; MEMBERS]> = LazyLock::new(|| {
    let dir = std::env::temp_dir().join(format!("tandem-members-{}", std::process::id()));
    let mut all = [(); MEMBERS].map(|()| Identity::load_or_create(&dir).unwrap());
    std::fs::remove_dir_all(&dir).unwrap();
    all.sort_by_key(Identity::node);
    all
});

pub(crate) fn member(number: usize) -> &'static Identity {
    &ALL[number]
}

pub(crate) fn id(number: usize) -> NodeId {
    member(number).node()
}
