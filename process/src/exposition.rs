//! The text format that Prometheus reads.

use std::fmt::{Display, Write};

/// The format's media type.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Introduces a metric: once, before its samples. `kind` is counter, gauge or histogram.
pub fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// One value of a metric.
pub fn sample(out: &mut String, name: &str, labels: &[(&str, &str)], value: impl Display) {
    out.push_str(name);
    for (at, (label, text)) in labels.iter().enumerate() {
        let _ = write!(out, "{}{label}=\"{}\"", if at == 0 { '{' } else { ',' }, escape(text));
    }
    let _ = writeln!(out, "{} {value}", if labels.is_empty() { "" } else { "}" });
}

/// The samples of a histogram: `counts` are those of each bucket alone, one more than there are `bounds`; `sum` is in
/// the unit of `bounds`.
pub fn histogram(
    out: &mut String,
    name: &str,
    labels: &[(&str, &str)],
    bounds: &[f64],
    counts: &[u64],
    sum: f64,
) {
    let bucket = format!("{name}_bucket");
    let mut count = 0;
    for (in_bucket, bound) in counts.iter().zip(bounds.iter().map(f64::to_string).chain(["+Inf".into()])) {
        count += in_bucket;
        sample(out, &bucket, &[labels, &[("le", bound.as_str())]].concat(), count);
    }
    sample(out, &format!("{name}_sum"), labels, sum);
    sample(out, &format!("{name}_count"), labels, count);
}

fn escape(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_as_prometheus_reads_them() {
        let mut out = String::new();
        head(&mut out, "a_total", "counter", "What it is.");
        sample(&mut out, "a_total", &[], 3);
        sample(&mut out, "a_total", &[("x", "a\"b\\c\nd"), ("y", "")], 4);
        histogram(&mut out, "h", &[("p", "q")], &[0.5, 1.0], &[1, 0, 2], 7.25);
        let expected = "# HELP a_total What it is.\n# TYPE a_total counter\na_total 3\n\
            a_total{x=\"a\\\"b\\\\c\\nd\",y=\"\"} 4\n\
            h_bucket{p=\"q\",le=\"0.5\"} 1\nh_bucket{p=\"q\",le=\"1\"} 1\nh_bucket{p=\"q\",le=\"+Inf\"} 3\n\
            h_sum{p=\"q\"} 7.25\nh_count{p=\"q\"} 3\n";
        assert_eq!(out, expected);
    }
}
