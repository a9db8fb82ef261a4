//! Which nodes are in the cluster. Nodes introduce themselves; those that serve something else stay out.

use std::collections::BTreeMap;
use tandem_proto::ids::NodeId;
use tandem_proto::keys::Fingerprint;
use tandem_proto::layout::KvShape;
use tandem_proto::wire::{Hello, Load, Role};

/// A node of the cluster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Member {
    /// How it introduced itself.
    pub hello: Hello,
    /// How busy it said it is.
    pub load: Load,
    /// It takes no new work.
    pub draining: bool,
}

/// Why a node stays out.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    /// It calls itself something else than its connection does.
    #[error("it says that it is {said}, but its connection is from {peer}")]
    Identity {
        /// Who it says it is.
        said: NodeId,
        /// Who it is.
        peer: NodeId,
    },
    /// It said hello before.
    #[error("it introduced itself twice")]
    Twice,
    /// It holds another model than the cluster.
    #[error(
        "it serves model {its}, and this cluster serves {ours}: start it with the same weights and options"
    )]
    Model {
        /// Its model.
        its: Fingerprint,
        /// The cluster's model.
        ours: Fingerprint,
    },
    /// Its KV has another shape.
    #[error("its KV is {its:?}, and this cluster's is {ours:?}: start it with the same options")]
    Shape {
        /// Its shape.
        its: KvShape,
        /// The cluster's shape.
        ours: KvShape,
    },
    /// It cannot hold any request.
    #[error("its longest sequence is {0} tokens; at least 2 are needed")]
    Sequence(u32),
    /// There are too many nodes.
    #[error("there are {0} nodes already, which is the limit")]
    Full(usize),
}

/// The most nodes of one cluster with one router.
pub const MAX_MEMBERS: usize = 1024;

/// The nodes that are up. All of them serve the same model with the same KV.
#[derive(Clone, Debug, Default)]
pub struct Members {
    nodes: BTreeMap<NodeId, Member>,
}

impl Members {
    /// Takes a node in. The first one decides what the cluster serves, until all have left.
    ///
    /// # Errors
    /// Says how the node differs.
    pub fn admit(&mut self, peer: NodeId, hello: Hello) -> Result<(), Refusal> {
        if hello.node != peer {
            return Err(Refusal::Identity { said: hello.node, peer });
        }
        if self.nodes.contains_key(&peer) {
            return Err(Refusal::Twice);
        }
        if self.nodes.len() >= MAX_MEMBERS {
            return Err(Refusal::Full(MAX_MEMBERS));
        }
        if hello.max_sequence_tokens < 2 {
            return Err(Refusal::Sequence(hello.max_sequence_tokens));
        }
        if let Some(Member { hello: ours, .. }) = self.nodes.values().next() {
            if hello.fingerprint != ours.fingerprint {
                return Err(Refusal::Model { its: hello.fingerprint, ours: ours.fingerprint });
            }
            if hello.kv != ours.kv {
                return Err(Refusal::Shape { its: hello.kv, ours: ours.kv });
            }
        }
        self.nodes.insert(peer, Member { hello, load: Load::default(), draining: false });
        Ok(())
    }

    /// Notes how busy a node is. False when it is not in the cluster.
    pub fn set_load(&mut self, node: NodeId, load: Load) -> bool {
        self.nodes.get_mut(&node).map(|member| member.load = load).is_some()
    }

    /// Notes that a node takes nothing new. False when it is not in the cluster.
    pub fn set_draining(&mut self, node: NodeId) -> bool {
        self.nodes.get_mut(&node).map(|member| member.draining = true).is_some()
    }

    /// Forgets a node, and returns what was known of it.
    pub fn remove(&mut self, node: NodeId) -> Option<Member> {
        self.nodes.remove(&node)
    }

    /// Whether the node is in the cluster.
    #[must_use]
    pub fn contains(&self, node: NodeId) -> bool {
        self.nodes.contains_key(&node)
    }

    /// All nodes, in a fixed order.
    #[must_use]
    pub fn list(&self) -> Vec<Member> {
        self.nodes.values().cloned().collect()
    }

    /// How many nodes of `role` take work.
    #[must_use]
    pub fn available(&self, role: Role) -> usize {
        self.nodes.values().filter(|member| member.hello.role == role && !member.draining).count()
    }

    /// The longest sequence that every node holds.
    #[must_use]
    pub fn max_sequence_tokens(&self) -> Option<u32> {
        self.nodes.values().map(|member| member.hello.max_sequence_tokens).min()
    }

    /// What the cluster serves.
    #[must_use]
    pub fn fingerprint(&self) -> Option<Fingerprint> {
        self.nodes.values().next().map(|member| member.hello.fingerprint)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use tandem_proto::layout::KvDtype;

    pub(crate) fn member(id: u64, role: Role) -> Member {
        Member { hello: hello(id, role), load: Load::default(), draining: false }
    }

    fn hello(id: u64, role: Role) -> Hello {
        Hello {
            node: NodeId(id),
            name: format!("{role}-{id}"),
            role,
            control: "127.0.0.1:1".parse().unwrap(),
            data: "127.0.0.1:2".parse().unwrap(),
            fingerprint: Fingerprint([1; 32]),
            kv: KvShape {
                layers: 6,
                kv_heads: 2,
                head_dim: 64,
                page_tokens: 16,
                chunk_tokens: 256,
                dtype: KvDtype::F32,
            },
            max_sequence_tokens: 4096,
        }
    }

    #[test]
    fn nodes_that_differ_stay_out() {
        let mut members = Members::default();
        members.admit(NodeId(1), hello(1, Role::Prefill)).unwrap();
        let mut check = |change: &dyn Fn(&mut Hello), peer: u64, expected: &str| {
            let mut hello = hello(2, Role::Decode);
            change(&mut hello);
            let text = members.admit(NodeId(peer), hello).unwrap_err().to_string();
            assert!(text.contains(expected), "{text:?}");
        };
        check(&|hello| hello.fingerprint = Fingerprint([2; 32]), 2, "it serves model 0202");
        check(&|hello| hello.kv.page_tokens = 32, 2, "its KV is");
        check(&|hello| hello.max_sequence_tokens = 1, 2, "longest sequence is 1");
        check(&|_| (), 3, "its connection is from");
        check(&|hello| hello.node = NodeId(1), 1, "twice");
    }

    #[test]
    fn the_cluster_is_what_its_nodes_are() {
        let mut members = Members::default();
        assert_eq!((members.max_sequence_tokens(), members.fingerprint()), (None, None));
        members.admit(NodeId(1), hello(1, Role::Prefill)).unwrap();
        members.admit(NodeId(2), Hello { max_sequence_tokens: 100, ..hello(2, Role::Decode) }).unwrap();
        assert_eq!(members.max_sequence_tokens(), Some(100));
        assert!(members.set_draining(NodeId(1)) && members.set_load(NodeId(2), Load::default()));
        assert!(!members.set_draining(NodeId(9)));
        assert_eq!((members.available(Role::Prefill), members.available(Role::Decode)), (0, 1));
        assert!(members.remove(NodeId(1)).is_some() && members.remove(NodeId(2)).is_some());
        // An empty cluster may serve something new.
        let other = Hello { fingerprint: Fingerprint([2; 32]), ..hello(3, Role::Decode) };
        members.admit(NodeId(3), other).unwrap();
    }
}
