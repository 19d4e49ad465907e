//! Bytes as the value of `grpc-timeout`: the budget is what the gRPC specification says, and an hour at most.
#![no_main]

use http::{HeaderMap, HeaderValue};
use libfuzzer_sys::{Corpus, fuzz_target};
use midemb::wire::decode::timeout;

fuzz_target!(|data: &[u8]| -> Corpus {
    let Ok(value) = HeaderValue::from_bytes(data) else { return Corpus::Reject };
    let headers = HeaderMap::from_iter([(http::HeaderName::from_static("grpc-timeout"), value)]);
    let nanoseconds = specified(data).map(|n| n.min(3600 * 1_000_000_000));
    assert_eq!(timeout(&headers).map(|budget| budget.as_nanos()), nanoseconds);
    Corpus::Keep
});

/// The nanoseconds that the value means; none if it is not one to eight digits and a unit.
fn specified(value: &[u8]) -> Option<u128> {
    let (unit, digits) = value.split_last()?;
    let nanoseconds = match unit {
        b'H' => 3_600_000_000_000,
        b'M' => 60_000_000_000,
        b'S' => 1_000_000_000,
        b'm' => 1_000_000,
        b'u' => 1000,
        b'n' => 1,
        _ => return None,
    };
    if digits.is_empty() || digits.len() > 8 {
        return None;
    }
    let mut n = 0;
    for digit in digits {
        n = 10 * n + u128::from(digit.checked_sub(b'0').filter(|digit| *digit <= 9)?);
    }
    Some(n * nanoseconds)
}
