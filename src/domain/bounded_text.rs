//! Bounds on text that comes from outside, before it is kept, logged or sent on.

use std::borrow::Cow;

/// The most bytes of a message to a client. A message travels in a header, and some clients take 8 KB of those in all.
pub const MAX_MESSAGE_BYTES: usize = 1024;

const ELLIPSIS: &str = "…";

/// `text` if it has at most `max_bytes` bytes, else as much of its start as fits there together with an ellipsis. Never splits
/// a character. A bound of less than the ellipsis's 3 bytes gives an empty text.
pub fn cut(text: &str, max_bytes: usize) -> Cow<'_, str> {
    if text.len() <= max_bytes {
        return Cow::Borrowed(text);
    }
    let Some(room) = max_bytes.checked_sub(ELLIPSIS.len()) else { return Cow::Borrowed("") };
    Cow::Owned(format!("{}{ELLIPSIS}", &text[..text.floor_char_boundary(room)]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_text_that_fits_is_not_copied() {
        assert!(matches!(cut("four", 4), Cow::Borrowed("four")));
        assert!(matches!(cut("", 0), Cow::Borrowed("")));
    }

    #[test]
    fn a_long_text_ends_with_an_ellipsis_and_no_half_character() {
        assert_eq!(cut("abcdefgh", 6), "abc…");
        assert_eq!(cut("äöüäöü", 6), "ä…", "the third byte would have been half of a character");
        assert_eq!(cut("abcdefgh", 3), "…");
        assert_eq!(cut("abcdefgh", 2), "");
    }

    proptest! {
        #[test]
        fn a_cut_text_is_within_its_bound_and_starts_as_the_text_does(text in ".{0,40}", max_bytes in 0_usize..60) {
            let bounded = cut(&text, max_bytes);
            prop_assert!(bounded.len() <= max_bytes);
            let kept = if bounded == text { &text } else { bounded.strip_suffix(ELLIPSIS).unwrap_or_default() };
            prop_assert!(text.starts_with(kept));
            prop_assert_eq!(bounded == text, text.len() <= max_bytes);
        }
    }
}
