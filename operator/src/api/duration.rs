//! Durations and shares as people write them: `1h30m`, `100ms`, `99.5%`.

/// Seconds of a duration such as `3s`, `1h30m` or `100ms`; `None` when it is none. Units are ns, us, ms, s, m and h, as
/// Kubernetes takes them.
pub fn seconds(text: &str) -> Option<f64> {
    let mut rest = text;
    let mut total = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(rest.len());
        let number = rest[..digits].parse::<f64>().ok().filter(|number| number.is_finite())?;
        rest = &rest[digits..];
        let letters = rest.find(|c: char| !c.is_ascii_lowercase()).unwrap_or(rest.len());
        total += number
            * match &rest[..letters] {
                "ns" => 1e-9,
                "us" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return None,
            };
        rest = &rest[letters..];
    }
    (!text.is_empty()).then_some(total)
}

/// The share that a percentage such as `99%` or `2.5%` is; `None` when it is none.
pub fn share(text: &str) -> Option<f64> {
    let number = text.strip_suffix('%')?;
    let plain = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    number.parse::<f64>().ok().filter(|_| plain).map(|percent| percent / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_sums_of_numbers_with_units() {
        for (text, expected) in [
            ("3s", 3.0),
            ("100ms", 0.1),
            ("1h30m", 5400.0),
            ("1.5s", 1.5),
            ("1ns", 1e-9),
            ("250us", 250e-6),
            ("10h", 36e3),
        ] {
            let found = seconds(text).expect(text);
            assert!((found - expected).abs() <= 1e-12 * expected.max(1.0), "{text}: {found}");
        }
        for text in ["", "3", "s", "-1s", "1d", "1s ", "1..2s", "1 s", "1e3s", "∞s"] {
            assert_eq!(seconds(text), None, "{text:?}");
        }
    }

    #[test]
    fn shares_are_percentages() {
        for (text, expected) in [("99%", 0.99), ("99.9%", 0.999), ("0%", 0.0), ("2.5%", 0.025)] {
            assert!(share(text).is_some_and(|found| (found - expected).abs() < 1e-12), "{text}");
        }
        for text in ["", "%", "99", "-1%", "1e1%", "a%", "9 9%"] {
            assert_eq!(share(text), None, "{text:?}");
        }
    }
}
