//! Which prefill and which decode node take a request: round robin, over nodes that take work.

use crate::membership::Member;
use tandem_proto::wire::Role;

/// The nodes of one attempt.
#[derive(Clone, Debug)]
pub struct Pair {
    /// Computes the prompt.
    pub prefill: Member,
    /// Generates.
    pub decode: Member,
}

/// Why there is no pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unplaced {
    /// No node of this role is up.
    #[error("no {0} node is up")]
    None(Role),
    /// Nodes of this role are up, and all of them are draining.
    #[error("every {0} node is draining")]
    Draining(Role),
}

/// The pair for turn `turn`. `avoid` holds for nodes that are better left alone, as after a failure there;
/// `max_waiting` is how many requests may wait at a node before others are preferred.
///
/// # Errors
/// When a role has no node that takes work.
pub fn place(
    members: &[Member],
    turn: u64,
    max_waiting: u32,
    avoid: impl Fn(&Member) -> bool,
) -> Result<Pair, Unplaced> {
    let prefill = candidates(members, Role::Prefill, max_waiting, &avoid)?;
    let decode = candidates(members, Role::Decode, max_waiting, &avoid)?;
    let (p, d) = (prefill.len() as u64, decode.len() as u64);
    // Every lcm(p, d) turns the two rings have come round together; the shift then pairs others.
    let shift = turn / (p / gcd(p, d) * d);
    let pick = |nodes: &[&Member], turn: u64| nodes[(turn % nodes.len() as u64) as usize].clone();
    Ok(Pair { prefill: pick(&prefill, turn), decode: pick(&decode, turn.wrapping_add(shift)) })
}

/// The nodes of `role` that take work, those with a short queue if there are any.
fn candidates<'a>(
    members: &'a [Member],
    role: Role,
    max_waiting: u32,
    avoid: &impl Fn(&Member) -> bool,
) -> Result<Vec<&'a Member>, Unplaced> {
    let up: Vec<&Member> = members.iter().filter(|member| member.hello.role == role).collect();
    if up.is_empty() {
        return Err(Unplaced::None(role));
    }
    let takes: Vec<&Member> = up.into_iter().filter(|member| !member.draining).collect();
    if takes.is_empty() {
        return Err(Unplaced::Draining(role));
    }
    // The node itself says when it is really full; what is preferred here is only preferred.
    let preferred = |test: &dyn Fn(&Member) -> bool, from: &[&'a Member]| {
        let kept: Vec<&'a Member> = from.iter().copied().filter(|member| test(member)).collect();
        if kept.is_empty() { from.to_vec() } else { kept }
    };
    let trusted = preferred(&|member| !avoid(member), &takes);
    Ok(preferred(&|member| member.load.waiting <= max_waiting, &trusted))
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::membership::tests::member;
    use std::collections::HashSet;

    fn nodes(prefill: u64, decode: u64) -> Vec<Member> {
        let prefill = (0..prefill).map(|id| member(id, Role::Prefill));
        prefill.chain((0..decode).map(|id| member(100 + id, Role::Decode))).collect()
    }

    #[test]
    fn every_pair_has_its_turn_and_nodes_share_the_work() {
        for (p, d) in [(1, 1), (2, 2), (1, 3), (2, 4), (3, 2), (6, 4)] {
            let members = nodes(p, d);
            let mut pairs = HashSet::new();
            let mut per_decode = std::collections::HashMap::new();
            for turn in 0..p * d {
                let pair = place(&members, turn, 4, |_| false).unwrap();
                pairs.insert((pair.prefill.hello.node, pair.decode.hello.node));
                *per_decode.entry(pair.decode.hello.node).or_insert(0) += 1;
            }
            assert_eq!(pairs.len() as u64, p * d, "{p} × {d}");
            assert!(per_decode.values().all(|count| *count == p), "{p} × {d}: {per_decode:?}");
        }
        assert!(place(&nodes(3, 2), u64::MAX, 4, |_| false).is_ok());
    }

    #[test]
    fn busy_and_draining_nodes_are_passed_over() {
        let mut members = nodes(2, 2);
        members[0].draining = true;
        members[3].load.waiting = 9;
        for turn in 0..8 {
            let pair = place(&members, turn, 4, |_| false).unwrap();
            assert_eq!((pair.prefill.hello.node.0, pair.decode.hello.node.0), (1, 100));
        }
        let avoided = place(&members, 0, 4, |member| member.hello.node.0 == 100).unwrap();
        assert_eq!(avoided.decode.hello.node.0, 101, "rather busy than failed before");
        let only = place(&nodes(1, 1), 0, 4, |_| true).unwrap();
        assert_eq!(only.decode.hello.node.0, 100, "rather failed before than none");
        members[1].draining = true;
        assert_eq!(place(&members, 0, 4, |_| false).unwrap_err(), Unplaced::Draining(Role::Prefill));
        assert_eq!(place(&nodes(1, 0), 0, 4, |_| false).unwrap_err(), Unplaced::None(Role::Decode));
    }
}
