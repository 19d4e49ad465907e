//! Bytes as the body of a `WarmItems` call, cut into pieces, through the forwarding of streams, the codec and the pipeline.
//!
//! A body of whole, valid messages is answered with what became of each item. Every other one is refused.
#![no_main]
#![allow(clippy::unwrap_used, reason = "a target that cannot go on says so")]

use libfuzzer_sys::fuzz_target;
use midemb_client::proto::{Item, ItemText, WarmItemsRequest};
use midemb_fuzz::{
    service::{LIMITS, MidEmbCaller},
    with_peak,
};
use prost::Message;
use std::sync::{LazyLock, Mutex};
use tonic::Code;

static CALLER: LazyLock<Mutex<MidEmbCaller>> = LazyLock::new(|| Mutex::new(MidEmbCaller::start()));

fuzz_target!(|data: &[u8]| {
    let Some((n_bytes, body)) = data.split_first() else { return };
    let mut caller = CALLER.lock().unwrap();
    caller.forget();
    let n_bytes = usize::from(*n_bytes) + 1;
    let (answer, peak) = with_peak(|| caller.warm_items(body, n_bytes));
    // A piece of one byte costs a frame.
    assert!(peak <= (1 << 20) + 128 * body.len(), "{peak} bytes for a body of {}", body.len());
    match messages(body) {
        Ok(messages) => {
            let Some(summary) = answer.response else {
                panic!("a valid stream was refused: {:?} {}", answer.code, answer.message)
            };
            let items = || messages.iter().flat_map(|message| &message.items);
            assert_eq!(summary.items, items().count() as u64);
            let has_text = |item: &Item| item.text.as_ref().is_some_and(|text| !is_empty(text));
            let n_unusable = items().filter(|item| item.id.is_empty() || !has_text(item)).count() as u64;
            let n_long = items().filter(|item| item.text.as_ref().is_some_and(is_long)).count() as u64;
            assert!((n_unusable..=n_unusable + n_long).contains(&summary.invalid), "{summary:?}");
            assert_eq!(summary.failed, 0);
            assert_eq!(summary.encoded + summary.already_cached + summary.invalid, summary.items);
        }
        Err(expected) => {
            // The rest of a text that is too long is not looked at, so it need not be what prost accepts.
            let is_beyond_prost = expected == Expected::Fault && answer.response.is_some();
            assert!(answer.code == expected.code() || is_beyond_prost, "{:?} {}", answer.code, answer.message);
        }
    }
});

/// Why a stream is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    /// A message is cut off, or what is in it is no message.
    Fault,
    Compressed,
    TooLarge,
}

impl Expected {
    fn code(self) -> Code {
        match self {
            Expected::Fault => Code::InvalidArgument,
            Expected::Compressed => Code::Unimplemented,
            Expected::TooLarge => Code::OutOfRange,
        }
    }
}

/// The messages of a body, as the framing of gRPC and prost read them.
fn messages(mut body: &[u8]) -> Result<Vec<WarmItemsRequest>, Expected> {
    let mut messages = Vec::new();
    while !body.is_empty() {
        let (prefix, rest) = body.split_first_chunk::<5>().ok_or(Expected::Fault)?;
        match prefix[0] {
            0 => {}
            1 => return Err(Expected::Compressed),
            _ => return Err(Expected::Fault),
        }
        let n_bytes = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
        if n_bytes > LIMITS.max_message_bytes {
            return Err(Expected::TooLarge);
        }
        let (message, rest) = rest.split_at_checked(n_bytes).ok_or(Expected::Fault)?;
        messages.push(WarmItemsRequest::decode(message).map_err(|_malformed| Expected::Fault)?);
        body = rest;
    }
    Ok(messages)
}

fn is_empty(text: &ItemText) -> bool {
    let lists = text.keywords.iter().chain(&text.attributes);
    [&text.title, &text.category, &text.brand, &text.price].into_iter().chain(lists).all(String::is_empty)
}

/// Whether the text may count as too long. What a text costs besides its characters is the server's business.
fn is_long(text: &ItemText) -> bool {
    text.encoded_len() > LIMITS.max_text_bytes / 2
}
