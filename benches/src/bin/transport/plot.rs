//! Throughput as a picture: one line for each way.

use crate::Options;
use crate::measure::Machine;
use crate::report::Figure;
use crate::way::Kind;
use std::fmt::Write as _;
use tandem_benches::plot::{DASHED, DOTTED, Line, Picture};

/// What lies along the horizontal axis: the first axis that has several values.
#[derive(Clone, Copy, PartialEq)]
enum Axis {
    Size,
    Extents,
    Peers,
}

impl Axis {
    fn of(options: &Options) -> Axis {
        match (options.sizes.len(), options.extents.len(), options.peers.len()) {
            (1, 1, 2..) => Axis::Peers,
            (1, 2.., _) => Axis::Extents,
            _ => Axis::Size,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Axis::Size => "bytes of a message",
            Axis::Extents => "extents of a message",
            Axis::Peers => "peers",
        }
    }

    fn value(self, figure: &Figure<'_>) -> usize {
        match self {
            Axis::Size => figure.point.size,
            Axis::Extents => figure.point.extents,
            Axis::Peers => figure.point.peers,
        }
    }

    fn label(self, value: usize) -> String {
        if self == Axis::Size { size(value) } else { value.to_string() }
    }
}

fn size(bytes: usize) -> String {
    for (unit, shift) in [("GiB", 30), ("MiB", 20), ("KiB", 10)] {
        if bytes >= 1 << shift && bytes.is_multiple_of(1 << shift) {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    format!("{bytes} B")
}

fn count(number: usize, of: &str) -> String {
    format!("{number} {of}{}", if number == 1 { "" } else { "s" })
}

pub(crate) fn svg(options: &Options, figures: &[Figure<'_>], machines: &[Machine]) -> String {
    let axis = Axis::of(options);
    let mut names: Vec<_> =
        machines.iter().map(|m| format!("{}, {}", m.cpu, count(m.cpus, "core"))).collect();
    names.dedup();
    tandem_benches::plot::svg(&Picture {
        title: title(options, axis),
        under: format!("{}; {}", names.join(" to "), count(options.rounds, "round")),
        across: axis.name(),
        label: &|value| axis.label(value),
        lines: lines(options, axis, figures),
    })
}

/// Fastest last values first, as the lines end beside the legend.
fn lines(options: &Options, axis: Axis, figures: &[Figure<'_>]) -> Vec<Line> {
    let mut all: Vec<Line> = Vec::new();
    for figure in figures {
        let mut name = figure.way.name.clone();
        if axis == Axis::Size && options.extents.len() > 1 {
            let _ = write!(name, ", {}", count(figure.point.extents, "extent"));
        }
        if axis != Axis::Peers && options.peers.len() > 1 && !figure.way.is_alone() {
            let _ = write!(name, ", {}", count(figure.point.peers, "peer"));
        }
        let point = (axis.value(figure), figure.gb_per_s);
        match all.iter_mut().find(|line| line.name == name) {
            Some(line) => line.points.push(point),
            None => all.push(Line { name, dashed: dash(figure.way.kind), points: vec![point] }),
        }
    }
    for line in &mut all {
        line.points.sort_by_key(|point| point.0);
    }
    let last = |line: &Line| line.points.last().map_or(0.0, |point| point.1);
    all.sort_by(|a, b| last(b).total_cmp(&last(a)));
    all
}

fn title(options: &Options, axis: Axis) -> String {
    let mut title = String::from("Throughput, GB/s");
    if options.both_ways {
        title += ", both directions together";
    }
    if let ([size], true) = (&options.sizes[..], axis != Axis::Size) {
        let _ = write!(title, ", messages of {}", self::size(*size));
    }
    if let ([2..=u16::MAX], true) = (&options.extents[..], axis != Axis::Extents) {
        let _ = write!(title, ", {} extents each", options.extents[0]);
    }
    if let ([2..=u8::MAX], true) = (&options.peers[..], axis != Axis::Peers) {
        let _ = write!(title, ", to {} peers", options.peers[0]);
    }
    title
}

/// Our paths are whole lines, limits are dashed, peers dotted.
fn dash(kind: Kind) -> &'static str {
    match kind {
        Kind::Ours { .. } => "",
        Kind::Nixl { .. } | Kind::Mooncake => DOTTED,
        _ => DASHED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        let check = |bytes, expected: &str| assert_eq!(size(bytes), expected);
        check(4096, "4 KiB");
        check(3 << 20, "3 MiB");
        check(1 << 30, "1 GiB");
        check(1000, "1000 B");
    }
}
