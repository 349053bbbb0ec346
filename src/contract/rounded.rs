//! Ids that may have lost digits in a client that holds numbers as doubles.
//!
//! JavaScript reads `954645333549048833` as the double nearest to it, and writes that as `954645333549048800`: the fewest
//! digits that name the double, and zeros. A number that is written just so may be what is left of another id, which
//! nobody can tell any more. This is a detector: an exact id can look the same by chance (see the tests for how often), and
//! a client that writes all digits of its double (`954645333549048832`) is not noticed.

use std::io::Write as _;

use crate::json::Number;

/// The smallest integer that a double cannot tell from its neighbour, 2^53: JavaScript writes 2^53 + 1 like it.
const FIRST: i64 = 1 << 53;
const FIRST_DIGITS: usize = 16;

/// So many digits name any double.
const DOUBLE_DIGITS: usize = 17;

/// JavaScript writes integers with more digits with an exponent.
const MAX_DIGITS: usize = 21;

/// Whether an integer is so large that a double may not hold it.
pub(super) fn is_large(number: &Number<'_>) -> bool {
    let digits = digits(number).len();
    digits > FIRST_DIGITS
        || digits == FIRST_DIGITS && number.small.is_none_or(|small| small.unsigned_abs() >= FIRST as u64)
}

/// Whether JavaScript, holding an integer that [`is_large`], would write just this literal.
pub(super) fn may_be_rounded(number: &Number<'_>) -> bool {
    let digits = digits(number);
    let behind = digits.get(DOUBLE_DIGITS..).unwrap_or_default();
    if digits.len() > MAX_DIGITS || behind.iter().any(|digit| *digit != b'0') {
        return false;
    }
    let double = str::from_utf8(digits).ok().and_then(|digits| digits.parse::<f64>().ok());
    double.is_some_and(|double| is_written_as(double, digits))
}

/// Display writes the fewest digits, and zeros, like `Number.prototype.toString` below 1e21.
fn is_written_as(double: f64, digits: &[u8]) -> bool {
    let mut text = [0; MAX_DIGITS + 1];
    let mut rest = &mut text[..];
    let is_whole = write!(rest, "{double}").is_ok();
    let written = MAX_DIGITS + 1 - rest.len();
    is_whole && text[..written] == *digits
}

/// Without the sign.
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

    /// What node 20 writes for each literal.
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
    fn what_javascript_writes_is_noticed_and_the_ids_themselves_are_not() {
        for (id, written) in WRITTEN {
            assert!(is_refused(written), "{written}");
            assert_eq!(is_refused(id), id == written, "{id}");
        }
        for exact in ["0", "-1", "954125366", "9007199254740991", "-9007199254740991", "954645333549048832"] {
            assert!(!is_refused(exact), "{exact}");
        }
        // With an exponent; no client writes these by itself.
        assert!(!is_refused("1000000000000000000000"));
        assert!(!is_refused(&format!("1{}", "0".repeat(400))));
    }

    /// Each double is written in one way, so that as many integers of a range are refused as it has doubles.
    fn one_in(range: std::ops::Range<f64>) -> f64 {
        (range.end - range.start) / (range.end.to_bits() - range.start.to_bits()) as f64
    }

    #[test]
    fn of_exact_random_ids_few_are_refused() {
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
            assert!(
                (found - wanted).abs() < 4.0 * wanted.sqrt(),
                "{range:?}: {found} refused, {wanted} expected"
            );
        }
    }
}
