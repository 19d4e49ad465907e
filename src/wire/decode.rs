//! From messages to plain types. All violations of a message are found here and reported together.

use super::proto;
use crate::{
    config::settings::Limits,
    domain::error::{Error, FieldViolation},
    domain::{DType, Item, ItemText, MidEmbRequest, Outputs},
};
use http::HeaderMap;
use std::time::{Duration, Instant};

/// A checked request and the element type of its answer.
#[derive(Debug)]
pub struct Decoded {
    /// The pipeline's input.
    pub request: MidEmbRequest,
    /// The element type that `wire::encode` writes tensors in.
    pub dtype: DType,
}

/// The number of violations that an answer lists at most: enough to fix a client without an answer of megabytes.
const MAX_VIOLATIONS: usize = 16;
/// A `grpc-timeout` can be years long; no caller waits that long, and adding it to an `Instant` could overflow.
const MAX_BUDGET: Duration = Duration::from_secs(3600);

/// Collects the violations of a request.
#[derive(Default)]
struct Violations(Vec<FieldViolation>);

impl Violations {
    fn add(&mut self, field: impl Into<String>, description: impl Into<String>) {
        if self.0.len() < MAX_VIOLATIONS {
            self.0.push(FieldViolation { field: field.into(), description: description.into() });
        }
    }

    fn finish(self) -> Result<(), Error> {
        if self.0.is_empty() { Ok(()) } else { Err(Error::InvalidArgument(self.0)) }
    }
}

/// Checks `message` against the contract and `limits`.
pub fn request(message: proto::GetMidEmbRequest, deadline: Instant, limits: &Limits) -> Result<Decoded, Error> {
    let mut violations = Violations::default();
    if message.user_id.is_empty() {
        violations.add("user_id", "is empty");
    }
    if message.candidates.is_empty() {
        violations.add("candidates", "is empty, at least one is required");
    }
    check_count("candidates", message.candidates.len(), limits.max_candidates, &mut violations);
    check_count("history", message.history.len(), limits.max_history, &mut violations);
    check_ids("candidates", &message.candidates, &mut violations);
    check_ids("history", &message.history, &mut violations);
    let outputs = outputs(&message.outputs, &mut violations);
    let dtype = dtype(message.dtype, &mut violations);
    violations.finish()?;
    let request = MidEmbRequest {
        user_id: message.user_id,
        history: items(message.history),
        candidates: items(message.candidates),
        model: Some(message.model).filter(|name| !name.is_empty()),
        outputs,
        deadline,
    };
    Ok(Decoded { request, dtype })
}

/// Converts the items of any message. Their ids are not checked here.
pub fn items(messages: Vec<proto::Item>) -> Vec<Item> {
    messages.into_iter().map(|item| Item { id: item.id, text: item.text.map(text) }).collect()
}

fn text(message: proto::ItemText) -> ItemText {
    let proto::ItemText { title, category, brand, price, keywords, attributes } = message;
    ItemText { title, category, brand, price, keywords, attributes }
}

fn check_count(field: &str, n: usize, max: usize, violations: &mut Violations) {
    if n > max {
        violations.add(field, format!("has {n} items, at most {max} are allowed"));
    }
}

fn check_ids(field: &str, items: &[proto::Item], violations: &mut Violations) {
    for (i, _) in items.iter().enumerate().filter(|(_, item)| item.id.is_empty()) {
        violations.add(format!("{field}[{i}].id"), "is empty");
    }
}

fn outputs(values: &[i32], violations: &mut Violations) -> Outputs {
    if values.is_empty() {
        return Outputs { mid_emb: true, ..Outputs::default() };
    }
    let mut outputs = Outputs::default();
    for (i, value) in values.iter().enumerate() {
        match proto::Output::try_from(*value) {
            Ok(proto::Output::MidEmb) => outputs.mid_emb = true,
            Ok(proto::Output::Cvr) => outputs.cvr = true,
            Ok(proto::Output::UserEmb) => outputs.user_emb = true,
            Ok(proto::Output::ItemEmb) => outputs.item_emb = true,
            Ok(proto::Output::Unspecified) | Err(_) => {
                violations.add(format!("outputs[{i}]"), format!("{value} is not an output, use 1 to 4"));
            }
        }
    }
    outputs
}

fn dtype(value: i32, violations: &mut Violations) -> DType {
    match proto::DType::try_from(value) {
        Ok(proto::DType::DtypeUnspecified | proto::DType::DtypeF32) => DType::F32,
        Ok(proto::DType::DtypeF16) => DType::F16,
        Ok(proto::DType::DtypeBf16) => DType::Bf16,
        Err(_) => {
            violations.add("dtype", format!("{value} is not an element type, use 0 to 3"));
            DType::F32
        }
    }
}

/// When the caller stops waiting: after its `grpc-timeout`, or after `default`.
pub fn deadline(headers: &HeaderMap, arrival: Instant, default: Duration) -> Instant {
    let sent = headers.get("grpc-timeout").and_then(|value| timeout(value.to_str().ok()?));
    arrival + sent.unwrap_or(default).min(MAX_BUDGET)
}

/// Parses `grpc-timeout`: up to eight digits and a unit. Any other value is treated as absent.
fn timeout(value: &str) -> Option<Duration> {
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let n: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(n * 3600)),
        "M" => Some(Duration::from_secs(n * 60)),
        "S" => Some(Duration::from_secs(n)),
        "m" => Some(Duration::from_millis(n)),
        "u" => Some(Duration::from_micros(n)),
        "n" => Some(Duration::from_nanos(n)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use prost::Message;

    const LIMITS: Limits = Limits {
        max_candidates: 3,
        max_history: 2,
        max_text_bytes: 100,
        max_message_bytes: 1 << 20,
        max_in_flight: 1,
        default_deadline: Duration::from_secs(1),
    };

    fn item(id: &str) -> proto::Item {
        proto::Item { id: id.to_owned(), text: None }
    }

    fn valid() -> proto::GetMidEmbRequest {
        proto::GetMidEmbRequest { user_id: "u".to_owned(), candidates: vec![item("a")], ..Default::default() }
    }

    fn violations(message: proto::GetMidEmbRequest) -> Vec<String> {
        match request(message, Instant::now(), &LIMITS) {
            Err(Error::InvalidArgument(violations)) => {
                violations.into_iter().map(|v| format!("{}: {}", v.field, v.description)).collect()
            }
            other => panic!("expected violations, got {other:?}"),
        }
    }

    #[test]
    fn the_defaults_are_mid_emb_in_f32_from_the_routed_model() {
        let decoded = request(valid(), Instant::now(), &LIMITS).unwrap();
        assert_eq!(decoded.dtype, DType::F32);
        assert_eq!(decoded.request.model, None);
        assert_eq!(decoded.request.outputs, Outputs { mid_emb: true, ..Outputs::default() });
    }

    #[test]
    fn every_violation_names_its_field_and_its_limit() {
        let message = proto::GetMidEmbRequest {
            user_id: String::new(),
            history: vec![item("h"); 3],
            candidates: vec![item("a"), item(""), item("c"), item("d")],
            outputs: vec![1, 99, 0],
            dtype: 99,
            ..Default::default()
        };
        assert_eq!(
            violations(message),
            [
                "user_id: is empty",
                "candidates: has 4 items, at most 3 are allowed",
                "history: has 3 items, at most 2 are allowed",
                "candidates[1].id: is empty",
                "outputs[1]: 99 is not an output, use 1 to 4",
                "outputs[2]: 0 is not an output, use 1 to 4",
                "dtype: 99 is not an element type, use 0 to 3",
            ]
        );
        let empty = proto::GetMidEmbRequest { candidates: Vec::new(), ..valid() };
        assert_eq!(violations(empty), ["candidates: is empty, at least one is required"]);
    }

    #[test]
    fn an_answer_lists_a_bounded_number_of_violations() {
        let history = vec![item(""); 1000];
        assert_eq!(violations(proto::GetMidEmbRequest { history, ..valid() }).len(), MAX_VIOLATIONS);
    }

    #[test]
    fn timeouts_are_parsed_as_grpc_defines_them() {
        assert_eq!(timeout("250m"), Some(Duration::from_millis(250)));
        assert_eq!(timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for invalid in ["", "m", "-1S", "1.5S", "123456789S", "5", "5x", "5é"] {
            assert_eq!(timeout(invalid), None, "{invalid}");
        }
        let mut metadata = HeaderMap::new();
        let now = Instant::now();
        assert_eq!(deadline(&metadata, now, Duration::from_secs(1)), now + Duration::from_secs(1));
        metadata.insert("grpc-timeout", "99999999H".parse().unwrap());
        assert_eq!(deadline(&metadata, now, Duration::from_secs(1)), now + MAX_BUDGET);
    }

    proptest! {
        #[test]
        fn decoding_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(message) = proto::GetMidEmbRequest::decode(bytes.as_slice()) {
                let _ = request(message, Instant::now(), &LIMITS);
            }
        }

        #[test]
        fn parsing_a_timeout_never_panics(value in "\\PC{0,12}") {
            let _ = timeout(&value);
        }
    }
}
