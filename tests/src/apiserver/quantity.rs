//! Canonical form of resource quantities: `1000m` is `1`, `1.5Gi` is `1536Mi`, `1024Mi` is `1Gi`.

/// Decimal suffixes from the smallest, each 1000 times the one before.
const DECIMAL: &[&str] = &["n", "u", "m", "", "k", "M", "G", "T", "P", "E"];
/// Binary suffixes from the smallest, each 1024 times the one before.
const BINARY: &[&str] = &["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
/// Nanos in a unit.
const NANO: i128 = 1_000_000_000;

/// The form in which the server writes a quantity, or `None` when the text is not one or is beyond 2⁶³.
pub(super) fn canonical(text: &str) -> Option<String> {
    let digits_end = text.find(|c: char| !matches!(c, '0'..='9' | '.' | '+' | '-')).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits_end);
    if let Some(power) = BINARY.iter().skip(1).position(|candidate| *candidate == suffix) {
        let nanos = parse_nanos(number)?.checked_mul(1024_i128.checked_pow(u32::try_from(power).ok()? + 1)?)?;
        return binary(nanos);
    }
    let exponent = suffix.strip_prefix(['e', 'E']).and_then(|exponent| exponent.parse::<i32>().ok());
    if let Some(exponent) = exponent {
        let nanos = scale(parse_nanos(number)?, exponent)?;
        return decimal_exponent(nanos);
    }
    let power = DECIMAL.iter().position(|candidate| *candidate == suffix)?;
    let nanos = scale(parse_nanos(number)?, (i32::try_from(power).ok()? - 3) * 3)?;
    decimal(nanos)
}

/// Nanos of a decimal number, rounded away from zero.
fn parse_nanos(number: &str) -> Option<i128> {
    let (negative, digits) = match number.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, number.strip_prefix('+').unwrap_or(number)),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let is_number = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if (whole.is_empty() && fraction.is_empty()) || !is_number(whole) || !is_number(fraction) {
        return None;
    }
    let whole: i128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let (kept, rest) = fraction.split_at(fraction.len().min(9));
    let mut nanos: i128 = format!("{kept:0<9}").parse().ok()?;
    nanos += i128::from(rest.bytes().any(|byte| byte != b'0'));
    let total = whole.checked_mul(NANO)?.checked_add(nanos)?;
    Some(if negative { -total } else { total })
}

fn scale(nanos: i128, power_of_ten: i32) -> Option<i128> {
    let factor = 10_i128.checked_pow(power_of_ten.unsigned_abs())?;
    if power_of_ten >= 0 {
        return nanos.checked_mul(factor);
    }
    let away = if nanos % factor == 0 { 0 } else { nanos.signum() };
    Some(nanos / factor + away)
}

fn decimal(nanos: i128) -> Option<String> {
    let (mantissa, power) = reduce(nanos, 1000, DECIMAL.len());
    in_range(nanos)?;
    Some(format!("{mantissa}{}", DECIMAL.get(power)?))
}

fn decimal_exponent(nanos: i128) -> Option<String> {
    let (mantissa, power) = reduce(nanos, 1000, usize::MAX);
    in_range(nanos)?;
    let exponent = i64::try_from(power).ok()? * 3 - 9;
    Some(if exponent == 0 { mantissa.to_string() } else { format!("{mantissa}e{exponent}") })
}

fn binary(nanos: i128) -> Option<String> {
    in_range(nanos)?;
    if nanos % NANO != 0 || (nanos / NANO).abs() < 1024 {
        return decimal(nanos);
    }
    let (mantissa, power) = reduce(nanos / NANO, 1024, BINARY.len());
    Some(format!("{mantissa}{}", BINARY.get(power)?))
}

fn in_range(nanos: i128) -> Option<()> {
    ((nanos / NANO).abs() <= i128::from(i64::MAX)).then_some(())
}

/// Divides by the base while nothing is lost: the quotient and how often.
fn reduce(mut value: i128, base: i128, limit: usize) -> (i128, usize) {
    if value == 0 {
        return (0, 3);
    }
    let mut power = 0;
    while value % base == 0 && power + 1 < limit {
        value /= base;
        power += 1;
    }
    (value, power)
}

#[cfg(test)]
mod tests {
    use super::canonical;

    #[test]
    fn quantities_are_written_as_the_server_writes_them() {
        let cases = [
            ("1000m", "1"),
            ("0.5", "500m"),
            ("1.5Gi", "1536Mi"),
            ("1024Mi", "1Gi"),
            ("1000Mi", "1000Mi"),
            ("0.5Gi", "512Mi"),
            ("2000", "2k"),
            ("1500", "1500"),
            ("0", "0"),
            ("1e3", "1e3"),
            ("4e9", "4e9"),
            ("100m", "100m"),
            ("512Ki", "512Ki"),
            ("0.5Ki", "512"),
            ("-1000m", "-1"),
            ("1.", "1"),
        ];
        for (text, expected) in cases {
            assert_eq!(canonical(text).as_deref(), Some(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_quantity_has_no_form() {
        for text in ["", "x", "1x", "1 Gi", "Gi", "1.2.3", "99999999999Ei"] {
            assert_eq!(canonical(text), None, "{text}");
        }
    }
}
