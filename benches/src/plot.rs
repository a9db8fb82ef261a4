//! Numbers as a picture: a few lines, both axes logarithmic. Light and dark come from the reader's settings.
//!
//! Ours, since the crates that draw know neither of the two, and this is all that is drawn.

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

/// A line that is dashed, or dotted.
pub const DASHED: &str = " stroke-dasharray=\"7 4\"";
/// See [`DASHED`].
pub const DOTTED: &str = " stroke-dasharray=\"2 4\"";

/// What is drawn.
pub struct Picture<'a> {
    /// What the numbers are, with their unit.
    pub title: String,
    /// Where and how they were measured.
    pub under: String,
    /// What lies along the horizontal axis.
    pub across: &'a str,
    /// How a value of that axis is written.
    pub label: &'a dyn Fn(usize) -> String,
    /// In the order of the legend.
    pub lines: Vec<Line>,
}

/// One line.
pub struct Line {
    /// In the legend.
    pub name: String,
    /// [`DASHED`], [`DOTTED`], or nothing.
    pub dashed: &'static str,
    /// From left to right.
    pub points: Vec<(usize, f64)>,
}

/// The picture, as SVG.
#[must_use]
pub fn svg(picture: &Picture<'_>) -> String {
    let all = || picture.lines.iter().flat_map(|line| &line.points);
    let numbers = || all().map(|(_, number)| *number);
    let ticks = ticks(numbers().fold(f64::INFINITY, f64::min), numbers().fold(0.0, f64::max));
    let mut values: Vec<_> = all().map(|(value, _)| *value).collect();
    values.sort_unstable();
    values.dedup();
    let place =
        |value: f64, from: f64, to: f64| if from < to { (value / from).ln() / (to / from).ln() } else { 0.5 };
    let ends =
        |values: &[f64]| (values.first().copied().unwrap_or(1.0), values.last().copied().unwrap_or(1.0));
    let across: Vec<_> = values.iter().map(|&value| value as f64).collect();
    let (least, most) = ends(&across);
    let x = |value: f64| LEFT + 14.0 + place(value, least, most) * (RIGHT - LEFT - 28.0);
    let (slow, fast) = ends(&ticks);
    let y = |number: f64| BOTTOM - place(number, slow, fast) * (BOTTOM - TOP);

    let legend_end = TOP + LINE * picture.lines.len() as f64;
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
    draw(format!("<text x=\"{LEFT}\" y=\"22\" font-size=\"15\">{}</text>", escape(&picture.title)));
    draw(format!("<text x=\"{LEFT}\" y=\"40\" class=\"quiet\">{}</text>", escape(&picture.under)));
    for &number in &ticks {
        let y = y(number);
        draw(format!("<path class=\"grid\" d=\"M{LEFT} {y:.1}H{RIGHT}\"/>"));
        draw(format!(
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{number}</text>",
            LEFT - 6.0,
            y + 4.0
        ));
    }
    for &value in &values {
        let (x, label) = (x(value as f64), (picture.label)(value));
        draw(format!("<path class=\"grid\" d=\"M{x:.1} {TOP}V{BOTTOM}\"/>"));
        draw(format!("<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>", BOTTOM + 18.0));
    }
    let middle = (LEFT + RIGHT) / 2.0;
    draw(format!(
        "<text x=\"{middle}\" y=\"{:.1}\" text-anchor=\"middle\" class=\"quiet\">{}</text>",
        BOTTOM + 38.0,
        picture.across
    ));
    for (line, Line { name, dashed, points }) in picture.lines.iter().enumerate() {
        let colour = line % COLOURS.len();
        let places: Vec<_> = points
            .iter()
            .map(|(value, number)| format!("{:.1},{:.1}", x(*value as f64), y(*number)))
            .collect();
        draw(format!("<polyline class=\"line c{colour}\"{dashed} points=\"{}\"/>", places.join(" ")));
        for place in &places {
            let (x, y) = place.split_once(',').unwrap_or_default();
            draw(format!("<circle class=\"dot d{colour}\" cx=\"{x}\" cy=\"{y}\" r=\"3\"/>"));
        }
        let (from, y) = (RIGHT + 16.0, TOP + LINE * line as f64);
        draw(format!("<path class=\"line c{colour}\"{dashed} d=\"M{from} {y:.1}h28\"/>"));
        draw(format!("<text x=\"{:.1}\" y=\"{:.1}\">{}</text>", from + 36.0, y + 4.0, escape(name)));
    }
    out + "</svg>\n"
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
}
