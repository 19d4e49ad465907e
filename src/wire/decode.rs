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
mod tests;
