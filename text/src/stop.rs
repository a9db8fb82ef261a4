//! Stop strings, found in text that comes in pieces.

/// Watches one completion's text for stop strings.
///
/// It gives text out as soon as it can no longer be part of a stop string. Cost per byte does not depend on
/// the length of the text or of the strings.
#[derive(Clone, Debug)]
pub struct StopStrings {
    patterns: Vec<Pattern>,
    /// Text that may yet turn out to be the start of a stop string.
    held: String,
    /// Give out the stop string too.
    include: bool,
}

/// What became of a piece of text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StopMatch {
    /// Text that may be shown.
    pub text: String,
    /// The index of the stop string that was found; no text follows it.
    pub stopped: Option<usize>,
}

impl StopStrings {
    /// Watches for `stops`; empty ones are ignored. With `include` the found one is part of the text.
    #[must_use]
    pub fn new(stops: &[String], include: bool) -> StopStrings {
        StopStrings {
            patterns: stops.iter().map(|stop| Pattern::new(stop)).collect(),
            held: String::new(),
            include,
        }
    }

    /// Takes the next piece of text.
    #[must_use]
    pub fn push(&mut self, piece: &str) -> StopMatch {
        let start = self.held.len();
        self.held.push_str(piece);
        for (offset, byte) in piece.bytes().enumerate() {
            let end = start + offset + 1;
            let ended =
                self.patterns.iter_mut().enumerate().filter_map(|(index, pattern)| {
                    pattern.step(byte).then_some((pattern.bytes.len(), index))
                });
            // Of those that end here, the longest began first. Every pattern takes its step.
            let found = ended.fold(None, |best: Option<(usize, usize)>, next| match best {
                Some(best) if best.0 >= next.0 => Some(best),
                _ => Some(next),
            });
            if let Some((len, index)) = found {
                self.held.truncate(if self.include { end } else { end - len });
                return StopMatch { text: std::mem::take(&mut self.held), stopped: Some(index) };
            }
        }
        // A pattern matched so far starts at a character's first byte, so this cuts between characters.
        let waiting = self.patterns.iter().map(|pattern| pattern.matched).max().unwrap_or(0);
        let kept = self.held.split_off(self.held.len() - waiting);
        StopMatch { text: std::mem::replace(&mut self.held, kept), stopped: None }
    }

    /// What was held back, when no text follows.
    #[must_use]
    pub fn finish(&mut self) -> String {
        self.patterns.iter_mut().for_each(|pattern| pattern.matched = 0);
        std::mem::take(&mut self.held)
    }
}

/// One stop string and how much of it the text's end matches (Knuth, Morris, Pratt).
#[derive(Clone, Debug)]
struct Pattern {
    bytes: Vec<u8>,
    /// For each length of a match, the next shorter one that also ends there.
    fallback: Vec<usize>,
    matched: usize,
}

impl Pattern {
    fn new(text: &str) -> Pattern {
        let bytes = text.as_bytes().to_vec();
        let mut fallback = vec![0; bytes.len() + 1];
        let mut matched = 0;
        for end in 1..bytes.len() {
            while matched > 0 && bytes[matched] != bytes[end] {
                matched = fallback[matched];
            }
            matched += usize::from(bytes[matched] == bytes[end]);
            fallback[end + 1] = matched;
        }
        Pattern { bytes, fallback, matched: 0 }
    }

    /// Whether the string is complete with `byte`.
    fn step(&mut self, byte: u8) -> bool {
        if self.bytes.is_empty() {
            return false;
        }
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.fallback[self.matched];
        }
        self.matched += usize::from(self.bytes[self.matched] == byte);
        self.matched == self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], include: bool, pieces: &[&str]) -> (String, Option<usize>) {
        let stops: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut matcher = StopStrings::new(&stops, include);
        let mut text = String::new();
        for piece in pieces {
            let StopMatch { text: out, stopped } = matcher.push(piece);
            text.push_str(&out);
            if stopped.is_some() {
                return (text, stopped);
            }
        }
        (text + &matcher.finish(), None)
    }

    #[test]
    fn finds_what_spans_pieces() {
        let check = |stops: &[&str], pieces: &[&str], expected: (&str, Option<usize>)| {
            let (text, stopped) = run(stops, false, pieces);
            assert_eq!((text.as_str(), stopped), expected, "{stops:?} in {pieces:?}");
        };
        check(&["\n\n"], &["one\n", "\ntwo"], ("one", Some(0)));
        check(&["\n\n"], &["one\n", "two\n"], ("one\ntwo\n", None));
        check(&["aab"], &["aa", "ab"], ("a", Some(0)));
        check(&["x", "END"], &["the E", "N", "D"], ("the ", Some(1)));
        check(&["d", "bcd"], &["abcd"], ("a", Some(1)));
        check(&["é€"], &["café", "€"], ("caf", Some(0)));
        check(&["", "b"], &["ab"], ("a", Some(1)));
        check(&[], &["a", "b"], ("ab", None));
        assert_eq!(run(&["b"], true, &["abc"]), ("ab".into(), Some(0)));
    }

    #[test]
    fn holds_back_no_more_than_it_must() {
        let mut matcher = StopStrings::new(&["</end>".into()], false);
        assert_eq!(matcher.push("a</e").text, "a");
        assert_eq!(matcher.push("m").text, "</em");
        assert_eq!(matcher.push("<").text, "");
        assert_eq!(matcher.finish(), "<");
    }

    proptest! {
        #[test]
        fn agrees_with_a_search_of_the_whole(
            pieces in prop::collection::vec("[abé]{0,4}", 0..12),
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
        ) {
            let whole = pieces.concat();
            // The first to end wins; of those that end together, the one that began first.
            let first = stops.iter().filter_map(|stop| whole.find(stop).map(|at| (at + stop.len(), at))).min();
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let (text, stopped) = run(&stops, false, &pieces);
            prop_assert_eq!(stopped.is_some(), first.is_some());
            prop_assert_eq!(text, &whole[..first.map_or(whole.len(), |(_, at)| at)]);
        }
    }
}
