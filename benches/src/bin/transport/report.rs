//! What the samples say: medians, ratios, and where they are written.

use crate::measure::{Measured, Point, Sample};
use crate::way::{Kind, Way};
use crate::{Options, plot};
use anyhow::Context;
use serde_json::json;
use tandem_benches::median;

/// What was found of a way at a point.
pub(crate) struct Figure<'a> {
    pub(crate) way: &'a Way,
    pub(crate) point: Point,
    pub(crate) gb_per_s: f64,
    cpu_send: f64,
    cpu_receive: f64,
    reported: Option<Latency>,
    landed: Option<Latency>,
    beside: Vec<Beside<'a>>,
}

/// Of all rounds' lone messages, in microseconds.
struct Latency {
    p50: f64,
    p99: f64,
    messages: usize,
}

/// Ratios to another way, within a round: the machine is not the same from one minute to the next.
struct Beside<'a> {
    what: &'a str,
    speed: f64,
    cpu_send: f64,
    cpu_receive: f64,
}

type Of = fn(&Sample) -> f64;
const SPEED: Of = |sample| sample.gb_per_s;
const CPU_SEND: Of = |sample| sample.cpu_send;
const CPU_RECEIVE: Of = |sample| sample.cpu_receive;

pub(crate) fn report(options: &Options, measured: &Measured) -> anyhow::Result<()> {
    let Measured { samples, machines } = measured;
    let figures = figures(options, samples);
    print(&figures);
    for (way, name) in options.ways.iter().enumerate() {
        let Kind::Ours { path: tandem_transport::Path::Quic, .. } = name.kind else { continue };
        let bare = name.name.replacen("quic", "quinn", 1);
        let Some(bare) = options.ways.iter().position(|way| way.name == bare) else { continue };
        let [speed, send, receive] =
            [SPEED, CPU_SEND, CPU_RECEIVE].map(|of| ratio(options, samples, way, bare, None, of));
        println!(
            "{name}: {speed:.2} of the speed of bare quinn, cpu {send:.2} and {receive:.2} times, at all points"
        );
    }
    if let Some(file) = &options.json {
        let command: Vec<_> = std::env::args().collect();
        let rows: Vec<_> = figures.iter().map(Figure::json).collect();
        let all = json!({
            "command": command.join(" "),
            "machines": machines.iter().map(|m| json!({"cpu": m.cpu, "cpus": m.cpus})).collect::<Vec<_>>(),
            "rounds": options.rounds, "seconds": options.seconds, "both_ways": options.both_ways, "figures": rows,
        });
        std::fs::write(file, serde_json::to_string_pretty(&all)?)
            .with_context(|| format!("{}", file.display()))?;
    }
    if let Some(file) = &options.svg {
        std::fs::write(file, plot::svg(options, &figures, machines))
            .with_context(|| format!("{}", file.display()))?;
    }
    Ok(())
}

fn figures<'a>(options: &'a Options, samples: &[Sample]) -> Vec<Figure<'a>> {
    let mut figures: Vec<Figure<'a>> = Vec::new();
    for first in samples.iter().filter(|sample| sample.round == 0) {
        let (way, point) = (first.way, first.point);
        let of_all = || samples.iter().filter(move |sample| sample.way == way && sample.point == point);
        let [gb_per_s, cpu_send, cpu_receive] =
            [SPEED, CPU_SEND, CPU_RECEIVE].map(|of| median(of_all().map(of).collect()));
        let beside = options.ways[way].beside().iter().filter_map(|&what| {
            let other = options.ways.iter().position(|way| way.name == what)?;
            let [speed, cpu_send, cpu_receive] =
                [SPEED, CPU_SEND, CPU_RECEIVE].map(|of| ratio(options, samples, way, other, Some(point), of));
            Some(Beside { what, speed, cpu_send, cpu_receive })
        });
        figures.push(Figure {
            way: &options.ways[way],
            point,
            gb_per_s,
            cpu_send,
            cpu_receive,
            reported: Latency::of(of_all().flat_map(|sample| &sample.reported_us)),
            landed: Latency::of(of_all().flat_map(|sample| &sample.landed_us)),
            beside: beside.collect(),
        });
    }
    figures
}

/// The median of one way's ratios to another in the same round, at one point or at all.
fn ratio(options: &Options, samples: &[Sample], way: usize, other: usize, at: Option<Point>, of: Of) -> f64 {
    let ratios =
        samples.iter().filter(|s| s.way == way && at.is_none_or(|at| s.point == at)).filter_map(|s| {
            let peers = if options.ways[other].is_alone() { 1 } else { s.point.peers };
            let point = Point { peers, ..s.point };
            let other = samples.iter().find(|o| o.way == other && o.round == s.round && o.point == point)?;
            Some(of(s) / of(other))
        });
    median(ratios.collect())
}

impl Latency {
    fn of<'a>(us: impl Iterator<Item = &'a f64>) -> Option<Latency> {
        let mut us: Vec<_> = us.copied().collect();
        us.sort_by(f64::total_cmp);
        let last = us.len().checked_sub(1)?;
        let at = |share: f64| us[(last as f64 * share).round() as usize];
        Some(Latency { p50: at(0.5), p99: at(0.99), messages: us.len() })
    }

    fn json(&self) -> serde_json::Value {
        json!({"p50_us": self.p50, "p99_us": self.p99, "messages": self.messages})
    }
}

impl Figure<'_> {
    fn json(&self) -> serde_json::Value {
        let Point { size, extents, peers } = self.point;
        let beside = self.beside.iter().map(|other| {
            json!({"what": other.what, "speed": other.speed, "cpu_send": other.cpu_send, "cpu_receive": other.cpu_receive})
        });
        json!({
            "way": self.way.name, "bytes": size, "extents": extents, "peers": peers, "gb_per_s": self.gb_per_s,
            "cpu_send_s_per_gb": self.cpu_send, "cpu_receive_s_per_gb": self.cpu_receive,
            "reported": self.reported.as_ref().map(Latency::json), "landed": self.landed.as_ref().map(Latency::json),
            "beside": beside.collect::<Vec<_>>(),
        })
    }
}

fn print(figures: &[Figure<'_>]) {
    println!(
        "{:<12} {:>10} {:>7} {:>5} {:>7} {:>7} {:>7} {:>9} {:>9} {:>9} {:>9}  beside (same round)",
        "", "", "", "", "", "cpu s per", "GB", "reported", "µs", "landed", "µs"
    );
    println!(
        "{:<12} {:>10} {:>7} {:>5} {:>7} {:>7} {:>7} {:>9} {:>9} {:>9} {:>9}",
        "way", "bytes", "extents", "peers", "GB/s", "send", "receive", "p50", "p99", "p50", "p99"
    );
    for Figure { way, point, gb_per_s, cpu_send, cpu_receive, reported, landed, beside } in figures {
        let Point { size, extents, peers } = point;
        let times = [reported, landed].map(|latency| match latency {
            Some(Latency { p50, p99, .. }) => format!("{p50:>9.1} {p99:>9.1}"),
            None => format!("{:>9} {:>9}", "-", "-"),
        });
        let beside = beside.iter().map(|Beside { what, speed, cpu_send, cpu_receive }| match *what {
            "tcp" => format!("{speed:.2} of {what} (cpu {cpu_send:.1}, {cpu_receive:.1} times)"),
            _ => format!("{speed:.2} of {what}"),
        });
        println!(
            "{:<12} {size:>10} {extents:>7} {peers:>5} {gb_per_s:>7.2} {cpu_send:>7.2} {cpu_receive:>7.2} {} {}  {}",
            way.name,
            times[0],
            times[1],
            beside.collect::<Vec<_>>().join(", ")
        );
    }
}
