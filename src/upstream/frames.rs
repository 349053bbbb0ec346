//! Detects an HTTP/2 upstream that contradicts itself about whether it processed a request.
//!
//! RST_STREAM with REFUSED_STREAM and GOAWAY say that a stream was not processed. Its request may then be sent again
//! (RFC 9113 §8.7 and §6.8). If the upstream has also sent HEADERS or DATA on that stream, it contradicts itself, and
//! is not believed.
//!
//! An exchange cannot detect this with hyper: hyper drops interim responses (103), which are HEADERS, and does not
//! tell an exchange the number of its stream. So this module reads the frame headers (§4.1) before hyper does. It
//! reports a contradiction of the connection as a whole, as soon as it has read the bytes that complete it.
//!
//! It checks nothing else: hyper rejects malformed frames.
//! (tests/hyper.rs: hyper_hides_interim_responses_over_http2)

use std::collections::VecDeque;

/// The length of a frame header in bytes.
const HEAD: usize = 9;

/// How many bytes of a payload are read: the error code of a RST_STREAM, or the last stream of a GOAWAY.
const VALUE: usize = 4;

// Frame types (RFC 9113 §6) and an error code (§7).
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const GOAWAY: u8 = 7;
const REFUSED_STREAM: u32 = 7;

/// The bits of a stream identifier, without the reserved one.
const STREAM: u32 = u32::MAX >> 1;

/// Reads the frames that the upstream sends on one connection, in pieces of any size.
#[derive(Debug)]
pub(super) struct FrameReader {
    /// The header of the present frame, and the first bytes of its payload where they are needed.
    head: [u8; HEAD + VALUE],
    /// How many bytes of `head` are filled.
    filled: usize,
    /// How many of the next bytes to skip: the rest of the present payload.
    skip: usize,
    /// The streams on which HEADERS or DATA came.
    answered: Streams,
    /// The lowest "last stream" of all GOAWAY frames. They say that no stream with a higher number was processed.
    last: u32,
}

impl Default for FrameReader {
    fn default() -> Self {
        let head = [0; HEAD + VALUE];
        Self { head, filled: 0, skip: 0, answered: Streams::default(), last: STREAM }
    }
}

impl FrameReader {
    /// Reads the next bytes of the connection. Returns whether they complete a contradiction: the upstream denies that
    /// it processed a stream, and has sent HEADERS or DATA on it.
    pub(super) fn read(&mut self, mut bytes: &[u8]) -> bool {
        let mut contradicts = false;
        // Only 13 bytes are buffered: payloads are not needed here, and the upstream chooses their size.
        while !bytes.is_empty() {
            let wanted = if self.skip > 0 { self.skip } else { self.wanted() - self.filled };
            let (piece, rest) = bytes.split_at(wanted.min(bytes.len()));
            bytes = rest;
            if self.skip > 0 {
                self.skip -= piece.len();
                continue;
            }
            self.head[self.filled..self.filled + piece.len()].copy_from_slice(piece);
            self.filled += piece.len();
            if self.filled == self.wanted() {
                // Not returned at once: the state must follow all the bytes, which hyper gets in any case.
                contradicts |= self.end_of_head();
            }
        }
        contradicts
    }

    /// Returns how many bytes of the present frame are needed: the header first, and once that is complete, the value
    /// in the payload, too, where there is one.
    fn wanted(&self) -> usize {
        // A frame that is too short for its value is malformed. Without this check, the header of the next frame would
        // be taken for the value.
        let has_value = matches!(self.head[3], RST_STREAM | GOAWAY) && self.length() >= VALUE;
        if self.filled >= HEAD && has_value { HEAD + VALUE } else { HEAD }
    }

    /// The length of the present frame's payload in bytes.
    fn length(&self) -> usize {
        usize::from(self.head[0]) << 16 | usize::from(self.head[1]) << 8 | usize::from(self.head[2])
    }

    /// Evaluates the present frame and prepares to skip the rest of its payload. Returns whether it completes a
    /// contradiction.
    fn end_of_head(&mut self) -> bool {
        let number = |at: usize| {
            let bytes = [self.head[at], self.head[at + 1], self.head[at + 2], self.head[at + 3]];
            u32::from_be_bytes(bytes)
        };
        let (stream, has_value) = (number(5) & STREAM, self.filled > HEAD);
        let contradicts = match self.head[3] {
            DATA | HEADERS => {
                self.answered.insert(stream);
                // The order does not matter: a reply after a GOAWAY that denied its stream is a contradiction, too.
                stream > self.last
            }
            RST_STREAM if has_value => number(HEAD) == REFUSED_STREAM && self.answered.contains(stream),
            GOAWAY if has_value => {
                // `min`: a server may send several GOAWAY frames, and must not raise the number (RFC 9113 §6.8). One
                // that does is not believed either.
                self.last = self.last.min(number(HEAD) & STREAM);
                self.answered.any_behind(self.last)
            }
            _ => false,
        };
        self.skip = self.length() - (self.filled - HEAD);
        self.filled = 0;
        contradicts
    }
}

/// How many words of 64 streams are kept: 65,536 streams in 8 KiB, far more than are ever open at once.
const WORDS: usize = 1024;

/// A set of client-initiated streams, one bit for each, since their numbers are 1, 3, 5 and so on.
///
/// Its memory is bounded: streams whose number is far below that of the newest one count as members. The error is on
/// the safe side: an outcome may become unknown without need, but no request is sent twice.
#[derive(Debug, Default)]
struct Streams {
    /// The number of the first word that is kept.
    first: usize,
    words: VecDeque<u64>,
}

impl Streams {
    fn insert(&mut self, stream: u32) {
        let Some((word, bit)) = word_and_bit(stream) else { return };
        if word >= self.first + self.words.len() + WORDS {
            // Nobody opened this stream, and hyper ends the connection for it. Without the jump one frame could make
            // the loop below fill words up to the highest number.
            // tests/hyper.rs: response_on_an_unopened_stream_closes_the_connection
            self.words.clear();
            self.first = word;
        }
        while word >= self.first + self.words.len() {
            if self.words.len() == WORDS {
                self.words.pop_front();
                self.first += 1;
            }
            self.words.push_back(0);
        }
        if let Some(kept) = word.checked_sub(self.first).and_then(|at| self.words.get_mut(at)) {
            *kept |= bit;
        }
    }

    fn contains(&self, stream: u32) -> bool {
        let Some((word, bit)) = word_and_bit(stream) else { return false };
        word.checked_sub(self.first).is_none_or(|at| self.words.get(at).is_some_and(|kept| kept & bit != 0))
    }

    /// Returns whether a member has a number above `last`.
    fn any_behind(&self, last: u32) -> bool {
        let next = (last as usize).div_ceil(2);
        let Some(at) = (next / 64).checked_sub(self.first) else { return true };
        let is_in = |(i, kept): (usize, &u64)| {
            let wanted = if i == 0 { u64::MAX << (next % 64) } else { u64::MAX };
            kept & wanted != 0
        };
        self.words.iter().skip(at).enumerate().any(is_in)
    }
}

/// Returns the number of the word and the bit for a stream; `None` for a stream that a client cannot open.
fn word_and_bit(stream: u32) -> Option<(usize, u64)> {
    let index = stream as usize / 2;
    (stream % 2 == 1).then_some((index / 64, 1 << (index % 64)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, 0], &stream.to_be_bytes(), payload].concat()
    }

    fn reset(stream: u32, reason: u32) -> Vec<u8> {
        frame(RST_STREAM, stream, &reason.to_be_bytes())
    }

    fn go_away(last: u32) -> Vec<u8> {
        frame(GOAWAY, 0, &[&last.to_be_bytes()[..], &[0; 4], b"debug data"].concat())
    }

    /// Whether the frames contradict each other. Checks that the verdict is the same however the bytes are cut: TCP
    /// may cut them anywhere.
    fn contradicts(frames: &[Vec<u8>]) -> bool {
        let bytes = frames.concat();
        let mut whole = FrameReader::default();
        let verdict = whole.read(&bytes);
        for size in 1..=bytes.len() {
            let mut cut = FrameReader::default();
            let verdicts: Vec<_> = bytes.chunks(size).map(|piece| cut.read(piece)).collect();
            assert_eq!(verdicts.contains(&true), verdict, "in pieces of {size}");
        }
        verdict
    }

    #[test]
    fn denial_of_an_answered_stream_is_a_contradiction() {
        let (head, data) = (frame(HEADERS, 5, b"block"), frame(DATA, 5, b""));
        let settings = frame(4, 0, &[0; 36]);
        for answer in [head.clone(), data] {
            assert!(contradicts(&[settings.clone(), answer.clone(), reset(5, REFUSED_STREAM)]));
            assert!(contradicts(&[answer.clone(), go_away(3)]));
            assert!(contradicts(&[go_away(3), answer.clone()]));
            assert!(contradicts(&[answer.clone(), go_away(STREAM), go_away(4)]));
            // The controls: another stream, another reason, and a GOAWAY that covers the stream.
            assert!(!contradicts(&[answer.clone(), reset(3, REFUSED_STREAM), reset(7, REFUSED_STREAM)]));
            assert!(!contradicts(&[answer.clone(), reset(5, 8)]));
            assert!(!contradicts(&[go_away(STREAM), answer, go_away(5)]));
        }
        assert!(!contradicts(&[settings, reset(1, REFUSED_STREAM), go_away(0)]));
        // The control for framing: what looks like a frame within a payload is none.
        let inner = [head, reset(5, REFUSED_STREAM)].concat();
        assert!(!contradicts(&[frame(DATA, 1, &inner)]));
        // Too short for their values. The frame after each must still be found.
        assert!(!contradicts(&[frame(GOAWAY, 0, b"bad"), frame(RST_STREAM, 1, b""), frame(DATA, 2, b"")]));
    }

    #[test]
    fn stream_set_is_bounded_and_errs_on_the_safe_side() {
        let mut streams = Streams::default();
        let all = 64 * WORDS as u32;
        // Up to twice as many streams as are kept, so that old words are dropped. Steps of 6 leave gaps, whose
        // streams must not be members.
        for stream in (1..4 * all).step_by(6) {
            assert!(!streams.contains(stream), "{stream}");
            streams.insert(stream);
            assert!(streams.contains(stream), "{stream}");
            assert!(!streams.contains(stream + 2), "{stream}");
            assert!(streams.any_behind(stream - 1), "{stream}");
            assert!(!streams.any_behind(stream), "{stream}");
        }
        assert_eq!(streams.words.len(), WORDS);
        assert!(streams.contains(3), "far behind the newest");
        assert!(streams.any_behind(1));
        // A stream that was dropped from the set already: it is a member, and must not bring its word back.
        streams.insert(1);
        streams.insert(STREAM);
        assert_eq!(streams.words.len(), 1);
        assert!(streams.contains(STREAM) && !streams.any_behind(STREAM) && streams.any_behind(0));
    }
}
