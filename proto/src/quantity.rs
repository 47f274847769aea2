//! Kubernetes quantities: `500m`, `1.5Gi`, `2e3`, exactly.

use std::{cmp::Ordering, fmt, iter::Sum, str::FromStr};

/// Nanounits of one unit.
const NANO: i128 = 1_000_000_000;
/// The largest quantity, 2^63-1 units: Kubernetes caps greater ones.
const MAX: i128 = i64::MAX as i128 * NANO;
/// Fractional digits that are kept before rounding; what comes after only decides whether it is rounded up.
const FRACTION_DIGITS: usize = 18;

/// A parsed quantity: an exact number of nanounits. Finer parts are rounded away from zero, as in Kubernetes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
pub struct Quantity {
    nanos: i128,
}

/// A text is not a quantity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuantityError;

impl fmt::Display for QuantityError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .write_str("quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'")
    }
}

impl std::error::Error for QuantityError {}

impl Quantity {
    /// Nothing.
    pub const ZERO: Self = Self { nanos: 0 };

    /// Whole units: bytes, cores, pods.
    pub fn from_units(units: i64) -> Self {
        Self {
            nanos: i128::from(units) * NANO,
        }
    }

    /// Thousandths.
    pub fn from_millis(millis: i64) -> Self {
        Self {
            nanos: i128::from(millis) * (NANO / 1000),
        }
    }

    /// Whole units, rounded up.
    pub fn units(&self) -> i64 {
        self.rounded_up(NANO)
    }

    /// Thousandths, rounded up.
    pub fn millis(&self) -> i64 {
        self.rounded_up(NANO / 1000)
    }

    /// Whether it is a whole number of units.
    pub fn is_integer(&self) -> bool {
        self.nanos % NANO == 0
    }

    /// Whether it is below zero.
    pub fn is_negative(&self) -> bool {
        self.nanos < 0
    }

    /// Whether it is nothing.
    pub fn is_zero(&self) -> bool {
        self.nanos == 0
    }

    /// The sum, capped as every quantity is.
    #[must_use]
    pub fn saturating_add(self, other: Self) -> Self {
        Self {
            nanos: (self.nanos + other.nanos).clamp(-MAX, MAX),
        }
    }

    /// The difference, capped as every quantity is.
    #[must_use]
    pub fn saturating_sub(self, other: Self) -> Self {
        Self {
            nanos: (self.nanos - other.nanos).clamp(-MAX, MAX),
        }
    }

    fn rounded_up(&self, unit: i128) -> i64 {
        let quotient = self.nanos.div_euclid(unit) + i128::from(self.nanos.rem_euclid(unit) != 0);
        i64::try_from(quotient).unwrap_or(if quotient < 0 { i64::MIN } else { i64::MAX })
    }
}

impl Sum for Quantity {
    fn sum<I: Iterator<Item = Self>>(quantities: I) -> Self {
        quantities.fold(Self::ZERO, Self::saturating_add)
    }
}

impl fmt::Display for Quantity {
    /// In decimal, with the largest unit of `""`, `m`, `u`, `n` that keeps it exact.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, suffix) in [(NANO, ""), (NANO / 1000, "m"), (NANO / 1_000_000, "u"), (1, "n")] {
            if self.nanos % unit == 0 {
                return write!(formatter, "{}{suffix}", self.nanos / unit);
            }
        }
        Ok(())
    }
}

/// Bytes as the kubelet writes memory: in Ki, or plain where that is not exact.
pub fn format_memory(bytes: u64) -> String {
    if bytes.is_multiple_of(1024) && bytes != 0 {
        format!("{}Ki", bytes / 1024)
    } else {
        bytes.to_string()
    }
}

/// What the suffix multiplies the number by.
enum Scale {
    /// A power of two.
    Binary(u32),
    /// A power of ten.
    Decimal(i32),
}

impl FromStr for Quantity {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let (negative, rest) = match text.as_bytes().first() {
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            _ => (false, text),
        };
        let end = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(rest.len());
        let (number, suffix) = rest.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
            return Err(QuantityError);
        }
        let nanos = match scale(suffix)? {
            Scale::Binary(power) => binary(whole, fraction, power),
            Scale::Decimal(power) => decimal(whole, fraction, power),
        };
        let nanos = nanos.unwrap_or(MAX).min(MAX);
        Ok(Self {
            nanos: if negative { -nanos } else { nanos },
        })
    }
}

fn scale(suffix: &str) -> Result<Scale, QuantityError> {
    Ok(match suffix {
        "" => Scale::Decimal(0),
        "Ki" => Scale::Binary(10),
        "Mi" => Scale::Binary(20),
        "Gi" => Scale::Binary(30),
        "Ti" => Scale::Binary(40),
        "Pi" => Scale::Binary(50),
        "Ei" => Scale::Binary(60),
        "n" => Scale::Decimal(-9),
        "u" => Scale::Decimal(-6),
        "m" => Scale::Decimal(-3),
        "k" => Scale::Decimal(3),
        "M" => Scale::Decimal(6),
        "G" => Scale::Decimal(9),
        "T" => Scale::Decimal(12),
        "P" => Scale::Decimal(15),
        "E" => Scale::Decimal(18),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E']).ok_or(QuantityError)?;
            let digits = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
            if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
                return Err(QuantityError);
            }
            // An exponent beyond this is the cap, or the smallest part, all the same.
            let size = digits.parse::<i32>().unwrap_or(i32::MAX).min(1_000_000);
            Scale::Decimal(if exponent.starts_with('-') { -size } else { size })
        }
    })
}

/// `whole.fraction * 10^power` in nanounits, rounded up; `None` when that is beyond every bound.
fn decimal(whole: &str, fraction: &str, power: i32) -> Option<i128> {
    let digits = || {
        whole
            .bytes()
            .chain(fraction.bytes())
            .map(|byte| i128::from(byte - b'0'))
    };
    // How many of the digits stand before the point once the number is in nanounits.
    let integer = i64::try_from(whole.len()).ok()? + i64::from(power) + 9;
    let mut nanos: i128 = 0;
    let mut index: i64 = 0;
    let mut rest = false;
    for digit in digits() {
        if index < integer {
            nanos = nanos.checked_mul(10)?.checked_add(digit)?;
        } else {
            rest |= digit != 0;
        }
        index += 1;
    }
    while index < integer && nanos != 0 {
        nanos = nanos.checked_mul(10)?;
        index += 1;
    }
    nanos.checked_add(i128::from(rest))
}

/// `whole.fraction * 2^power` in nanounits, rounded up; `None` when that is beyond every bound.
fn binary(whole: &str, fraction: &str, power: u32) -> Option<i128> {
    let mut units: i128 = 0;
    for byte in whole.bytes() {
        units = units.checked_mul(10)?.checked_add(i128::from(byte - b'0'))?;
    }
    let mut part: i128 = 0;
    for index in 0..FRACTION_DIGITS {
        part = part * 10 + i128::from(fraction.as_bytes().get(index).map_or(0, |byte| byte - b'0'));
    }
    let rest = fraction.bytes().skip(FRACTION_DIGITS).any(|byte| byte != b'0');
    // 10^18 * 2^60 fits; the division leaves 10^9 parts of a unit.
    let scaled = part << power;
    let up = scaled % NANO != 0 || rest;
    units
        .checked_mul(1 << power)?
        .checked_mul(NANO)?
        .checked_add(scaled / NANO + i128::from(up))
}

/// Compares two quantities as they are written; `None` when one of them is none.
pub fn compare(left: &str, right: &str) -> Option<Ordering> {
    Some(left.parse::<Quantity>().ok()?.cmp(&right.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn nanos(text: &str) -> i128 {
        text.parse::<Quantity>().unwrap_or_else(|_| panic!("{text}")).nanos
    }

    #[test]
    fn all_suffixes() {
        for (text, expected) in [
            ("0", 0),
            ("1", NANO),
            ("+1", NANO),
            ("-1", -NANO),
            ("1.", NANO),
            (".5", NANO / 2),
            ("100m", NANO / 10),
            ("1.5Gi", 1_610_612_736 * NANO),
            ("1Ki", 1024 * NANO),
            ("1Ei", (1 << 60) * NANO),
            ("1E", 1_000_000_000_000_000_000 * NANO),
            ("1E2", 100 * NANO),
            ("1e-3", NANO / 1000),
            ("1e+3", 1000 * NANO),
            ("5u", 5000),
            ("5n", 5),
            ("0.5n", 1),
            ("0.0000000001", 1),
            ("-0.0000000001", -1),
            ("1k", 1000 * NANO),
            ("12M", 12_000_000 * NANO),
            ("0.1Ki", 102_400_000_000),
            ("007", 7 * NANO),
        ] {
            assert_eq!(nanos(text), expected, "{text}");
        }
    }

    #[test]
    fn what_is_no_quantity() {
        for text in [
            "", ".", "+", "-", "m", "1 ", " 1", "1K", "1mi", "1ki", "1e", "1e+", "1e1.5", "--1", "1..2", "1.2.3",
            "0x10", "1Kim", "NaN", "inf", "1_000", "١", "1e3m", "1i",
        ] {
            assert_eq!(text.parse::<Quantity>(), Err(QuantityError), "{text:?}");
        }
    }

    #[test]
    fn the_cap_is_that_of_kubernetes() {
        let zeros = format!("1{}", "0".repeat(100_000));
        for text in [
            "9223372036854775807",
            "9223372036854775808",
            "1e1000",
            "100Ei",
            "1e999999999999",
            &zeros,
        ] {
            assert_eq!(nanos(text), MAX, "{}", &text[..20.min(text.len())]);
        }
        assert_eq!(nanos("-1e1000"), -MAX);
        assert_eq!(nanos("1e-1000"), 1);
        assert_eq!(nanos("0e1000"), 0);
    }

    #[test]
    fn rounding_goes_up() {
        let quantity: Quantity = "1.0001".parse().expect("quantity");
        assert_eq!((quantity.units(), quantity.millis()), (2, 1001));
        let negative: Quantity = "-1.5".parse().expect("quantity");
        assert_eq!((negative.units(), negative.millis()), (-1, -1500));
        assert_eq!(compare("1", "1000m"), Some(Ordering::Equal));
        assert_eq!(format_memory(2048), "2Ki");
    }

    proptest! {
        #[test]
        fn display_comes_back(nanos in -MAX..=MAX) {
            let quantity = Quantity { nanos };
            prop_assert_eq!(quantity.to_string().parse::<Quantity>(), Ok(quantity));
        }

        #[test]
        fn no_text_panics(text in "[-+]?[0-9.]{0,60}([eEinumkKMGTP]{0,3}[-+]?[0-9]{0,12})|\\PC{0,20}") {
            let _ = text.parse::<Quantity>();
        }
    }
}
