//! Throughput as a picture: one line for each way, both axes logarithmic. Light and dark come from the reader's settings.
//!
//! Ours, since the crates that draw know neither of the two, and this is all that is drawn.

use crate::Options;
use crate::report::Figure;
use crate::way::Kind;
use std::fmt::Write as _;

const WIDTH: f64 = 940.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 700.0;
const TOP: f64 = 56.0;
const BOTTOM: f64 = 430.0;
/// Between two lines of the legend.
const LINE: f64 = 17.0;
/// Of lines: on light ground, and on dark.
const COLOURS: [(&str, &str); 8] = [
    ("#0060c0", "#60b0ff"),
    ("#c04000", "#ff9060"),
    ("#008050", "#40d0a0"),
    ("#a000a0", "#f080f0"),
    ("#806000", "#e0c040"),
    ("#c00050", "#ff80a0"),
    ("#505050", "#b0b0b0"),
    ("#4030c0", "#a0a0ff"),
];

/// A line: its name, where it stands among the ways, and its places.
struct Series {
    name: String,
    way: usize,
    points: Vec<(f64, f64)>,
}

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

pub(crate) fn svg(options: &Options, figures: &[Figure<'_>]) -> String {
    let axis = Axis::of(options);
    let all_series = series(options, axis, figures);
    let speeds = figures.iter().map(|figure| figure.gb_per_s);
    let ticks = ticks(speeds.clone().fold(f64::INFINITY, f64::min), speeds.fold(0.0, f64::max));
    let mut values: Vec<_> = figures.iter().map(|figure| axis.value(figure)).collect();
    values.sort_unstable();
    values.dedup();
    let place =
        |value: f64, from: f64, to: f64| if from < to { (value / from).ln() / (to / from).ln() } else { 0.5 };
    let ends = |values: &[f64]| (values[0], values[values.len() - 1]);
    let across: Vec<_> = values.iter().map(|&value| value as f64).collect();
    let (least, most) = ends(&across);
    let x = |value: f64| LEFT + 14.0 + place(value, least, most) * (RIGHT - LEFT - 28.0);
    let (slow, fast) = ends(&ticks);
    let y = |speed: f64| BOTTOM - place(speed, slow, fast) * (BOTTOM - TOP);

    let legend_end = TOP + LINE * all_series.len() as f64;
    let height = f64::max(BOTTOM + 50.0, legend_end + 20.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n{}",
        style()
    );
    let mut draw = |part: String| {
        out += &part;
        out.push('\n');
    };
    draw(format!("<rect class=\"ground\" width=\"{WIDTH}\" height=\"{height}\"/>"));
    draw(format!("<text x=\"{LEFT}\" y=\"22\" font-size=\"15\">{}</text>", escape(&title(options, axis))));
    let cpu = tandem_benches::cpu_model();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let under = format!("{cpu}, {}; {}", count(cpus, "core"), count(options.rounds, "round"));
    draw(format!("<text x=\"{LEFT}\" y=\"40\" class=\"quiet\">{}</text>", escape(&under)));
    for &speed in &ticks {
        let y = y(speed);
        draw(format!("<path class=\"grid\" d=\"M{LEFT} {y:.1}H{RIGHT}\"/>"));
        draw(format!(
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{speed}</text>",
            LEFT - 6.0,
            y + 4.0
        ));
    }
    for &value in &values {
        let (x, label) = (x(value as f64), axis.label(value));
        draw(format!("<path class=\"grid\" d=\"M{x:.1} {TOP}V{BOTTOM}\"/>"));
        draw(format!("<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>", BOTTOM + 18.0));
    }
    let middle = (LEFT + RIGHT) / 2.0;
    draw(format!(
        "<text x=\"{middle}\" y=\"{:.1}\" text-anchor=\"middle\" class=\"quiet\">{}</text>",
        BOTTOM + 38.0,
        axis.name()
    ));
    for (line, Series { name, way, points }) in all_series.iter().enumerate() {
        let (colour, kind) = (line % COLOURS.len(), dash(options.ways[*way].kind));
        let places: Vec<_> =
            points.iter().map(|(value, speed)| format!("{:.1},{:.1}", x(*value), y(*speed))).collect();
        draw(format!("<polyline class=\"line c{colour}\"{kind} points=\"{}\"/>", places.join(" ")));
        for place in &places {
            let (x, y) = place.split_once(',').unwrap_or_default();
            draw(format!("<circle class=\"dot d{colour}\" cx=\"{x}\" cy=\"{y}\" r=\"3\"/>"));
        }
        let (from, y) = (RIGHT + 16.0, TOP + LINE * line as f64);
        draw(format!("<path class=\"line c{colour}\"{kind} d=\"M{from} {y:.1}h28\"/>"));
        draw(format!("<text x=\"{:.1}\" y=\"{:.1}\">{}</text>", from + 36.0, y + 4.0, escape(name)));
    }
    out + "</svg>\n"
}

/// Fastest last values first, as the lines end beside the legend.
fn series(options: &Options, axis: Axis, figures: &[Figure<'_>]) -> Vec<Series> {
    let mut all: Vec<Series> = Vec::new();
    for figure in figures {
        let mut name = figure.way.name.clone();
        if axis == Axis::Size && options.extents.len() > 1 {
            let _ = write!(name, ", {}", count(figure.point.extents, "extent"));
        }
        if axis != Axis::Peers && options.peers.len() > 1 && !figure.way.is_alone() {
            let _ = write!(name, ", {}", count(figure.point.peers, "peer"));
        }
        let point = (axis.value(figure) as f64, figure.gb_per_s);
        match all.iter_mut().find(|series| series.name == name) {
            Some(series) => series.points.push(point),
            None => {
                let way = options.ways.iter().position(|way| way == figure.way).unwrap_or(0);
                all.push(Series { name, way, points: vec![point] });
            }
        }
    }
    for series in &mut all {
        series.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    all.sort_by(|a, b| b.last().total_cmp(&a.last()));
    all
}

impl Series {
    fn last(&self) -> f64 {
        self.points.last().map_or(0.0, |point| point.1)
    }
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

/// 1, 2 and 5 of each power of ten, from below the least to above the most.
fn ticks(least: f64, most: f64) -> Vec<f64> {
    let all = (-6..6).flat_map(|power| [1.0, 2.0, 5.0].map(|digit| (digit, power)));
    // Parsed, so that 0.2 is written as such.
    let all: Vec<f64> = all.filter_map(|(digit, power)| format!("{digit}e{power}").parse().ok()).collect();
    let from = all.iter().rposition(|tick| *tick <= least).unwrap_or(0);
    let to = all.iter().position(|tick| *tick >= most).unwrap_or(all.len() - 1);
    all[from..=to.max(from)].to_vec()
}

/// Our paths are whole lines, limits are dashed, peers dotted.
fn dash(kind: Kind) -> &'static str {
    match kind {
        Kind::Ours { .. } => "",
        Kind::Nixl { .. } | Kind::Mooncake => " stroke-dasharray=\"2 4\"",
        _ => " stroke-dasharray=\"7 4\"",
    }
}

fn style() -> String {
    let colours = |of: fn(&(&'static str, &'static str)) -> &'static str| {
        let rule = |(index, colour): (usize, &'static str)| {
            format!(".c{index}{{stroke:{colour}}}.d{index}{{fill:{colour}}}")
        };
        COLOURS.iter().map(of).enumerate().map(rule).collect::<String>()
    };
    let (light, dark) = (colours(|pair| pair.0), colours(|pair| pair.1));
    format!(
        "<style>text{{fill:#222}}.quiet{{fill:#666}}.ground{{fill:#fff}}.grid{{stroke:#ddd;fill:none}}.line{{fill:none;stroke-width:2}}{light}\
         @media (prefers-color-scheme:dark){{text{{fill:#ddd}}.quiet{{fill:#999}}.ground{{fill:#161616}}.grid{{stroke:#383838}}{dark}}}</style>\n"
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_enclose() {
        let check =
            |least, most, expected: &[f64]| assert_eq!(ticks(least, most), expected, "{least} to {most}");
        check(0.3, 4.0, &[0.2, 0.5, 1.0, 2.0, 5.0]);
        check(2.0, 2.0, &[2.0]);
        check(9.0, 11.0, &[5.0, 10.0, 20.0]);
    }

    #[test]
    fn sizes_are_short() {
        let check = |bytes, expected: &str| assert_eq!(size(bytes), expected);
        check(4096, "4 KiB");
        check(3 << 20, "3 MiB");
        check(1 << 30, "1 GiB");
        check(1000, "1000 B");
    }
}
