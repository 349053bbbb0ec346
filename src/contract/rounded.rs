//! Detects ids that may have lost precision in a client that holds numbers as doubles (IEEE 754 binary64).
//!
//! JavaScript reads `954645333549048833` as the double nearest to it, and writes that as `954645333549048800`: the shortest
//! digits that name the double, padded with zeros. A number with just these digits may be a rounded id, whose true value cannot
//! be recovered. The check is a heuristic. An exact id can look rounded by chance; the tests say how often. A client that writes
//! all digits of its double (`954645333549048832`) is not detected.

use std::io::Write as _;

use crate::json::Number;

/// The smallest integer that may be a rounded one, 2^53.
// Not 2^53 + 1: JavaScript reads that as 2^53, so that 2^53 itself may be what is left of it.
const FIRST: i64 = 1 << 53;
const FIRST_DIGITS: usize = 16;

/// The number of significant digits that suffice to identify every double.
const DOUBLE_DIGITS: usize = 17;

/// The most digits of an integer that JavaScript writes without an exponent.
const MAX_DIGITS: usize = 21;

/// Whether the magnitude of an integer is 2^53 or more. A double cannot hold all such integers exactly.
pub(super) fn is_large(number: &Number<'_>) -> bool {
    let digits = digits(number).len();
    digits > FIRST_DIGITS
        || digits == FIRST_DIGITS && number.small.is_none_or(|small| small.unsigned_abs() >= FIRST as u64)
}

/// Whether JavaScript would write this literal for the double nearest to it. Must be called only for an integer for which
/// [`is_large`] returns true.
pub(super) fn may_be_rounded(number: &Number<'_>) -> bool {
    let digits = digits(number);
    // Most exact ids end here: the shortest digits of a double are 17 at most, and JavaScript pads them with zeros.
    let behind = digits.get(DOUBLE_DIGITS..).unwrap_or_default();
    if digits.len() > MAX_DIGITS || behind.iter().any(|digit| *digit != b'0') {
        return false;
    }
    let double = str::from_utf8(digits).ok().and_then(|digits| digits.parse::<f64>().ok());
    double.is_some_and(|double| is_written_as(double, digits))
}

/// Whether JavaScript writes `double` with these digits.
// Rust's `Display` writes the shortest digits and pads with zeros, as `Number.prototype.toString` does below 1e21.
fn is_written_as(double: f64, digits: &[u8]) -> bool {
    // One digit more than the longest, for 1e21: a double to which integers of 21 digits are rounded up.
    let mut text = [0; MAX_DIGITS + 1];
    let mut rest = &mut text[..];
    let is_whole = write!(rest, "{double}").is_ok();
    let written = MAX_DIGITS + 1 - rest.len();
    is_whole && text[..written] == *digits
}

/// Returns the literal without its sign.
fn digits<'a>(number: &Number<'a>) -> &'a [u8] {
    number.literal.strip_prefix(b"-").unwrap_or(number.literal)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_refused(literal: &str) -> bool {
        let number = Number::known(literal).unwrap();
        is_large(&number) && may_be_rounded(&number)
    }

    /// Pairs of a literal and what node 20 writes for it.
    const WRITTEN: [(&str, &str); 14] = [
        ("9007199254740992", "9007199254740992"),
        ("9007199254740993", "9007199254740992"),
        ("9007199254740995", "9007199254740996"),
        ("9999999999999999", "10000000000000000"),
        ("12345678901234567", "12345678901234568"),
        ("72057594037927937", "72057594037927940"),
        ("954645333549048833", "954645333549048800"),
        ("1611917095665261978", "1611917095665262000"),
        ("9223372036854775807", "9223372036854776000"),
        ("10000000000000000001", "10000000000000000000"),
        ("18446744073709551615", "18446744073709552000"),
        ("123456789012345678901", "123456789012345680000"),
        ("999999999999999900001", "999999999999999900000"),
        ("-954645333549048833", "-954645333549048800"),
    ];

    #[test]
    fn ids_rounded_by_javascript_are_detected_and_exact_ids_pass() {
        for (id, written) in WRITTEN {
            assert!(is_refused(written), "{written}");
            assert_eq!(is_refused(id), id == written, "{id}");
        }
        for exact in ["0", "-1", "954125366", "9007199254740991", "-9007199254740991", "954645333549048832"] {
            assert!(!is_refused(exact), "{exact}");
        }
        // JavaScript writes these with an exponent, so that no client has produced the digits by rounding.
        assert!(!is_refused("1000000000000000000000"));
        assert!(!is_refused(&format!("1{}", "0".repeat(400))));
    }

    /// Returns how many integers of a range there are for each one that is refused.
    // Each double is written in one way, so that as many integers of a range are refused as it has doubles. The bit patterns of
    // positive doubles are consecutive, so that their difference counts them.
    fn one_in(range: std::ops::Range<f64>) -> f64 {
        (range.end - range.start) / (range.end.to_bits() - range.start.to_bits()) as f64
    }

    #[test]
    fn few_exact_random_ids_are_rejected() {
        const SAMPLES: u64 = 400_000;
        let two_to_64 = 18_446_744_073_709_551_616.0;
        let ranges = [
            (9_007_199_254_740_992.0..1e16, 2.0),
            (1e16..1e17, 6.1),
            (1e17..1e18, 59.7),
            (1e18..1e19, 596.6),
            (1e19..two_to_64, 2048.0),
        ];
        let mut random = fastrand::Rng::with_seed(1);
        for (range, expected) in ranges {
            let one_in = one_in(range.clone());
            assert!((one_in - expected).abs() < 0.05, "{range:?}: 1 in {one_in}");
            let (first, last) = (range.start as u64, (range.end as u128 - 1) as u64);
            let refused = (0..SAMPLES).filter(|_| is_refused(&random.u64(first..=last).to_string())).count();
            let (wanted, found) = (SAMPLES as f64 / one_in, refused as f64);
            // Four standard deviations of a Poisson count. With the fixed seed the sample is the same in each run.
            assert!(
                (found - wanted).abs() < 4.0 * wanted.sqrt(),
                "{range:?}: {found} refused, {wanted} expected"
            );
        }
    }
}
