//! A line as the value of `authorization`, and the rest as `admin.token_file`: only a caller who sends a token of the file gets
//! in, and is named as the file says.
#![no_main]
#![allow(clippy::unwrap_used, reason = "a target that cannot go on says so")]

use libfuzzer_sys::{Corpus, fuzz_target};
use midemb::wire::operator::{Guard, Operator};
use midemb_fuzz::scratch::Scratch;
use std::sync::LazyLock;
use tonic::{Request, metadata::MetadataValue, service::Interceptor};

static FOLDER: LazyLock<Scratch> = LazyLock::new(Scratch::new);

fuzz_target!(|data: &[u8]| -> Corpus {
    let Some(end) = data.iter().position(|byte| *byte == b'\n') else { return Corpus::Reject };
    let (header, file) = (&data[..end], &data[end + 1..]);
    let Ok(authorization) = MetadataValue::try_from(header) else { return Corpus::Reject };
    let mut guard = Guard::new(Some(FOLDER.write("tokens", file)));
    let mut request = Request::new(());
    request.metadata_mut().insert("authorization", authorization);
    let tokens = std::str::from_utf8(file).ok().map(tokens).unwrap_or_default();
    // A header is text only where it is ASCII.
    let sent = std::str::from_utf8(header)
        .ok()
        .filter(|header| header.is_ascii())
        .and_then(|header| header.strip_prefix("Bearer "))
        .map(str::trim);
    let expected = tokens.iter().find(|(_, token)| Some(*token) == sent);
    match (guard.call(request), expected) {
        (Ok(request), Some((name, _))) => {
            assert_eq!(Operator::of(&request), format!("{name} from unknown address"));
        }
        (Err(refused), None) => {
            let is_secret_shown = tokens.iter().any(|(_, token)| token.len() > 20 && refused.message().contains(token));
            assert!(!is_secret_shown, "{}", refused.message());
        }
        (answered, expected) => panic!("answered {answered:?}, expected {expected:?}"),
    }
    Corpus::Keep
});

/// The names and tokens of a file: the last word of each line with at least two words, unless it is a comment.
fn tokens(file: &str) -> Vec<(&str, &str)> {
    let mut tokens = Vec::new();
    for line in file.split('\n').map(str::trim) {
        let Some(token) = line.split_whitespace().next_back() else { continue };
        let name = line[..line.len() - token.len()].trim();
        if !name.is_empty() && !name.starts_with('#') {
            tokens.push((name, token));
        }
    }
    tokens
}
