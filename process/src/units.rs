//! Durations and sizes as people write them, for `value_parser = units::duration`.

use std::time::Duration;

/// A duration: `250ms`, `30s`, `10m`, `2h`; a bare number means seconds.
///
/// # Errors
/// Says what is allowed.
pub fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text);
    let scale = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("unit {unit:?} is not one of ms, s, m, h")),
    };
    let number: f64 =
        number.parse().map_err(|_| "not a duration such as 250ms, 30s, 10m or 2h".to_owned())?;
    Duration::try_from_secs_f64(number * scale).map_err(|e| e.to_string())
}

/// A size in bytes: `65536`, `64KiB`, `16MiB`, `2GiB`; also `KB`, `MB`, `GB` as powers of ten.
///
/// # Errors
/// Says what is allowed.
pub fn bytes(text: &str) -> Result<usize, String> {
    let (number, unit) = split(text);
    let scale: u64 = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        _ => {
            return Err(format!("unit {unit:?} is not one of B, KiB, MiB, GiB, KB, MB, GB"));
        }
    };
    let number: u64 = number.parse().map_err(|_| "not a size such as 65536, 64KiB or 16MiB".to_owned())?;
    let product = number.checked_mul(scale).and_then(|bytes| usize::try_from(bytes).ok());
    product.ok_or_else(|| "more bytes than this machine can address".to_owned())
}

fn split(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    (&text[..end], text[end..].trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let check = |text, expected: Option<u64>| {
            assert_eq!(duration(text).ok().map(|d| d.as_millis() as u64), expected, "{text}");
        };
        check("250ms", Some(250));
        check("30", Some(30_000));
        check("1.5s", Some(1_500));
        check("2 m", Some(120_000));
        check("1h", Some(3_600_000));
        for wrong in ["", "s", "-3s", "3 days", "1e9999", "99999999999999999999999h"] {
            check(wrong, None);
        }
    }

    #[test]
    fn sizes() {
        let check = |text, expected| assert_eq!(bytes(text).ok(), expected, "{text}");
        check("65536", Some(65_536));
        check("64KiB", Some(65_536));
        check("2 MB", Some(2_000_000));
        for wrong in ["", "1.5GiB", "-1", "9 lots", "99999999999GiB"] {
            check(wrong, None);
        }
    }
}
