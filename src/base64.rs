//! Base64 with padding (RFC 4648, section 4). Encoding only; two uses are not worth a dependency.

/// Returns the text for these bytes.
pub(crate) fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    // The exact size: bytes may hold a password, and a buffer that grows would leave copies of a part of it in
    // freed memory.
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let mut group = [0; 4];
        group[1..=three.len()].copy_from_slice(three);
        let group = u32::from_be_bytes(group);
        for (position, shift) in [18, 12, 6, 0].into_iter().enumerate() {
            let letter = LETTERS[(group >> shift & 63) as usize];
            text.push(if position <= three.len() { char::from(letter) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::base64;

    #[test]
    fn base64_matches_the_test_vectors_of_rfc_4648() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            let encoded = base64(bytes.as_bytes());
            assert_eq!(encoded, text);
            assert_eq!(encoded.capacity(), text.len(), "it grew");
        }
        assert_eq!(base64(&[0xfb, 0xff, 0xbf]), "+/+/");
    }
}
