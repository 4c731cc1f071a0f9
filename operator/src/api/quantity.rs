//! Kubernetes quantities: exact comparison, and bytes for people.

use std::fmt;

use super::ErnieModel;

/// Nano-units of a quantity such as `1500m`, `4Gi` or `1e3`; `None` when it is none or beyond all sense.
pub fn parse(text: &str) -> Option<i128> {
    let (number, scale) = split(text.trim())?;
    let (negative, digits) = match number.as_bytes().first()? {
        b'-' => (true, &number[1..]),
        b'+' => (false, &number[1..]),
        _ => (false, number),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if whole.is_empty() && fraction.is_empty() || !whole.bytes().chain(fraction.bytes()).all(|b| b.is_ascii_digit()) {
        return None;
    }
    // More than 18 digits after the point cannot matter: a nano-unit has nine, and a suffix scales by 2^60 at most.
    let fraction = &fraction[..fraction.len().min(18)];
    let mantissa = format!("{whole}{fraction}").parse::<i128>().ok()?;
    let below = 10i128.pow(u32::try_from(fraction.len()).ok()?);
    let nano = match scale {
        Scale::Binary(power) => mantissa.checked_mul(1i128 << power)?.checked_mul(1_000_000_000)?,
        Scale::Decimal(power) => {
            let exponent = power + 9;
            match u32::try_from(exponent) {
                Ok(up) => mantissa.checked_mul(10i128.checked_pow(up)?)?,
                Err(_) => mantissa.checked_div(10i128.checked_pow(exponent.unsigned_abs())?)?,
            }
        }
    };
    let nano = nano / below;
    Some(if negative { -nano } else { nano })
}

/// True when both are the same amount, whatever their spelling.
pub fn same(left: &str, right: &str) -> bool {
    left == right || matches!((parse(left), parse(right)), (Some(a), Some(b)) if a == b)
}

enum Scale {
    Binary(u32),
    Decimal(i32),
}

fn split(text: &str) -> Option<(&str, Scale)> {
    let end = text.find(|c: char| !(c.is_ascii_digit() || "+-.".contains(c))).unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let scale = match suffix {
        "n" => Scale::Decimal(-9),
        "u" => Scale::Decimal(-6),
        "m" => Scale::Decimal(-3),
        "" => Scale::Decimal(0),
        "k" => Scale::Decimal(3),
        "M" => Scale::Decimal(6),
        "G" => Scale::Decimal(9),
        "T" => Scale::Decimal(12),
        "P" => Scale::Decimal(15),
        "E" => Scale::Decimal(18),
        "Ki" => Scale::Binary(10),
        "Mi" => Scale::Binary(20),
        "Gi" => Scale::Binary(30),
        "Ti" => Scale::Binary(40),
        "Pi" => Scale::Binary(50),
        "Ei" => Scale::Binary(60),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E'])?.parse::<i32>().ok()?;
            Scale::Decimal(if (-40..=40).contains(&exponent) { exponent } else { return None })
        }
    };
    Some((number, scale))
}

/// A number of bytes, shown as people write limits: `512 MiB`, `3.1 GiB`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Bytes(pub u64);

impl Bytes {
    /// Bytes of a quantity; `None` when it is none, or negative.
    pub fn of_quantity(text: &str) -> Option<Self> {
        u64::try_from(parse(text)? / 1_000_000_000).ok().map(Self)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const STEPS: [(u64, &str); 4] = [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
        for (unit, name) in STEPS {
            if self.0 >= unit {
                let tenths = (u128::from(self.0) * 10 + u128::from(unit) / 2) / u128::from(unit);
                let (whole, tenth) = (tenths / 10, tenths % 10);
                return if tenth == 0 { write!(f, "{whole} {name}") } else { write!(f, "{whole}.{tenth} {name}") };
            }
        }
        write!(f, "{} B", self.0)
    }
}

/// The memory limit of a worker.
pub fn memory_limit(model: &ErnieModel) -> Option<Bytes> {
    Bytes::of_quantity(&model.spec.resources.limits.as_ref()?.get("memory")?.0)
}

/// The memory limit of a worker, in words.
pub fn memory_text(model: &ErnieModel) -> String {
    memory_limit(model).map_or_else(|| "no limit is set".to_owned(), |limit| format!("limit {limit}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_amount_in_other_words_is_the_same() {
        for (left, right) in [
            ("1", "1000m"),
            ("4Gi", "4096Mi"),
            ("1.5Gi", "1536Mi"),
            ("0.5", "500m"),
            ("1e3", "1k"),
            ("100E-3", "0.1"),
            ("+2", "2"),
            ("1G", "1000M"),
        ] {
            assert!(same(left, right), "{left} {right}");
        }
        for (left, right) in [("1", "1001m"), ("4Gi", "4G"), ("x", "1"), ("1", "-1")] {
            assert!(!same(left, right), "{left} {right}");
        }
    }

    #[test]
    fn nonsense_is_no_quantity_and_never_overflows() {
        let digits = "9".repeat(60);
        for text in ["", "Gi", "1 Gi", "1e9Gi", "1e99", "..", "1.2.3", "--1", "1e", digits.as_str()] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn bytes_are_rounded_to_a_tenth() {
        assert_eq!(Bytes(3 << 30).to_string(), "3 GiB");
        assert_eq!(Bytes((3 << 30) + (100 << 20)).to_string(), "3.1 GiB");
        assert_eq!(Bytes(512 << 20).to_string(), "512 MiB");
        assert_eq!(Bytes(17).to_string(), "17 B");
        assert_eq!(Bytes::of_quantity("1Gi"), Some(Bytes(1 << 30)));
        assert_eq!(Bytes::of_quantity("-1"), None);
    }
}
