//! From messages to plain types. All violations of a message are found here and reported together.
//!
//! Requests are decoded field by field from their bytes. What is over its bound is counted or skipped but never stored: entries
//! beyond the limits, and texts that are too long. So a message never needs more than a small multiple of its size in memory.

use super::{
    proto,
    raw::{Fields, Malformed, RawMessage},
};
use crate::{
    config::settings::Limits,
    domain::error::{Error, FieldViolation},
    domain::{
        Action, DType, Item, ItemText, MidEmbRequest, Outputs,
        item_text::{self, TextFault},
    },
};
use http::HeaderMap;
use std::{
    borrow::Cow,
    time::{Duration, Instant},
};

/// A checked request and the element type of its answer.
#[derive(Debug)]
pub struct Decoded<'a> {
    /// The pipeline's input.
    pub request: MidEmbRequest<'a>,
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
        if !self.is_full() {
            self.0.push(FieldViolation { field: field.into(), description: description.into() });
        }
    }

    fn is_full(&self) -> bool {
        self.0.len() == MAX_VIOLATIONS
    }

    fn finish(self) -> Result<(), Error> {
        if self.0.is_empty() { Ok(()) } else { Err(Error::InvalidArgument(self.0)) }
    }
}

/// Checks a `GetMidEmbRequest` against the contract and `limits`.
pub fn request<'a>(message: &'a RawMessage, deadline: Instant, limits: &Limits) -> Result<Decoded<'a>, Error> {
    let parts = Parts::read(message, limits).map_err(malformed)?;
    let outputs = parts.outputs.wanted();
    let mut violations = Violations::default();
    if parts.candidates.n == 0 {
        violations.add("candidates", "is empty, at least one is required");
    }
    parts.candidates.check_count(limits.max_candidates, &mut violations);
    parts.history.check_count(limits.max_history, &mut violations);
    parts.candidates.check_ids(&mut violations);
    parts.history.check_ids(&mut violations);
    let n_actions = parts.history_actions.n;
    // A list of which too many are wrong is not read to its end.
    let has_all_actions = !parts.history_actions.violations.is_full();
    if has_all_actions && n_actions != 0 && n_actions != parts.history.n {
        let description =
            format!("has {n_actions} entries, it must be empty or have one per history item ({})", parts.history.n);
        violations.add("history_actions", description);
    }
    for violation in parts.outputs.violations.0.into_iter().chain(parts.history_actions.violations.0) {
        violations.add(violation.field, violation.description);
    }
    let dtype = dtype(parts.dtype, &mut violations);
    violations.finish()?;
    let request = MidEmbRequest {
        user_id: parts.user_id,
        history: parts.history.items,
        history_actions: parts.history_actions.actions,
        candidates: parts.candidates.items,
        model: Some(parts.model).filter(|name| !name.is_empty()),
        outputs,
        deadline,
    };
    Ok(Decoded { request, dtype })
}

/// The items of a `WarmItemsRequest`. Their ids are not checked here.
pub fn warm_items<'a>(message: &'a RawMessage, limits: &Limits) -> Result<Vec<Item<'a>>, Error> {
    let mut items = Vec::new();
    for field in Fields::of(&message.0) {
        let field = field.map_err(malformed)?;
        if field.number() == 1 {
            let item = field.bytes().and_then(|bytes| item(bytes, limits.max_text_bytes));
            items.push(item.map_err(malformed)?);
        }
        if items.len() > MAX_WARM_ITEMS {
            let description = format!("more than {MAX_WARM_ITEMS} items in one message");
            return Err(Error::InvalidArgument(vec![FieldViolation { field: "items".to_owned(), description }]));
        }
    }
    Ok(items)
}

/// The most items of one message of a warm-up stream, so that items without text cannot take many times the message's size.
const MAX_WARM_ITEMS: usize = 100_000;

fn malformed(fault: Malformed) -> Error {
    let description = format!("is not a valid message: {fault}");
    Error::InvalidArgument(vec![FieldViolation { field: "request".to_owned(), description }])
}

/// The fields of a `GetMidEmbRequest`.
struct Parts<'a> {
    user_id: &'a str,
    history: Items<'a>,
    candidates: Items<'a>,
    model: &'a str,
    outputs: WantedOutputs,
    dtype: i32,
    history_actions: HistoryActions,
}

impl<'a> Parts<'a> {
    fn read(message: &'a RawMessage, limits: &Limits) -> Result<Self, Malformed> {
        let mut parts = Parts {
            user_id: "",
            history: Items::new("history", limits.max_history, message),
            candidates: Items::new("candidates", limits.max_candidates, message),
            model: "",
            outputs: WantedOutputs::default(),
            dtype: 0,
            history_actions: HistoryActions { max: limits.max_history, ..HistoryActions::default() },
        };
        for field in Fields::of(&message.0) {
            let field = field?;
            match field.number() {
                1 => parts.user_id = field.text()?,
                2 => parts.history.push(field.bytes()?, limits.max_text_bytes)?,
                3 => parts.candidates.push(field.bytes()?, limits.max_text_bytes)?,
                4 => parts.model = field.text()?,
                5 => field.each_number(|value| parts.outputs.add(value))?,
                6 => parts.dtype = field.number_value()?,
                7 => field.each_number(|value| parts.history_actions.add(value))?,
                // A field of a newer contract.
                _ => {}
            }
        }
        Ok(parts)
    }
}

/// One list of items. What is beyond its bound is counted and not stored.
struct Items<'a> {
    name: &'static str,
    max: usize,
    /// The size of the whole message.
    n_message_bytes: usize,
    n: usize,
    items: Vec<Item<'a>>,
}

impl<'a> Items<'a> {
    fn new(name: &'static str, max: usize, message: &RawMessage) -> Self {
        Items { name, max, n_message_bytes: message.0.len(), n: 0, items: Vec::new() }
    }

    fn push(&mut self, message: &'a [u8], max_text_bytes: usize) -> Result<(), Malformed> {
        if self.n == 0 {
            // Items have similar sizes: as many as would fit into the message, in at most four times its size.
            let n_alike = self.n_message_bytes / message.len().max(1);
            let n_affordable = 4 * self.n_message_bytes / size_of::<Item<'_>>();
            self.items.reserve(n_alike.min(n_affordable).min(self.max));
        }
        self.n += 1;
        if self.n <= self.max {
            self.items.push(item(message, max_text_bytes)?);
        }
        Ok(())
    }

    fn check_count(&self, max: usize, violations: &mut Violations) {
        if self.n > max {
            violations.add(self.name, format!("has {} items, at most {max} are allowed", self.n));
        }
    }

    fn check_ids(&self, violations: &mut Violations) {
        for (i, _) in self.items.iter().enumerate().filter(|(_, item)| item.id.is_empty()) {
            violations.add(format!("{}[{i}].id", self.name), "is empty");
        }
    }
}

fn item(message: &[u8], max_text_bytes: usize) -> Result<Item<'_>, Malformed> {
    let mut id = "";
    let mut text: Option<Cow<'_, [u8]>> = None;
    for field in Fields::of(message) {
        let field = field?;
        match field.number() {
            1 => id = field.text()?,
            // A message that comes twice is merged, which is the same as one of both their fields.
            2 => match &mut text {
                Some(first) => {
                    if let Cow::Borrowed(alone) = first {
                        check_fields(alone)?;
                    }
                    check_fields(field.bytes()?)?;
                    first.to_mut().extend_from_slice(field.bytes()?);
                }
                None => text = Some(Cow::Borrowed(field.bytes()?)),
            },
            _ => {}
        }
    }
    let text = text.map(|message| item_text(&message, max_text_bytes)).transpose()?;
    Ok(Item { id, text })
}

/// Checks that `message` is a message of its own: two halves of a field are none, although together they would be.
fn check_fields(message: &[u8]) -> Result<(), Malformed> {
    Fields::of(message).try_for_each(|field| field.map(drop))
}

fn item_text(message: &[u8], max_bytes: usize) -> Result<Result<ItemText, TextFault>, Malformed> {
    let mut single = [""; 4];
    let (mut keywords, mut attributes) = (Vec::new(), Vec::new());
    let mut n_bytes = 0;
    for field in Fields::of(message) {
        let field = field?;
        let value = match field.number() {
            1..=6 => field.text()?,
            _ => "",
        };
        match field.number() {
            n @ 1..=4 => single[n as usize - 1] = value,
            5 => keywords.push(value),
            6 => attributes.push(value),
            _ => {}
        }
        // A bound on the work, somewhat above the bound on the text: each field counts, even if it is empty or unknown.
        n_bytes += value.len() + 1;
        if n_bytes > max_bytes + single.len() {
            return Ok(Err(TextFault::TooLong { max: max_bytes }));
        }
    }
    let text = ItemText::new(single, &keywords, &attributes);
    Ok(item_text::check(&text, max_bytes).map(|()| text))
}

/// The outputs that a request names.
#[derive(Default)]
struct WantedOutputs {
    n: usize,
    outputs: Outputs,
    violations: Violations,
}

impl WantedOutputs {
    /// Adds one value. False if no more need to be read.
    fn add(&mut self, value: i32) -> bool {
        match proto::Output::try_from(value) {
            Ok(proto::Output::MidEmb) => self.outputs.mid_emb = true,
            Ok(proto::Output::Cvr) => self.outputs.cvr = true,
            Ok(proto::Output::UserEmb) => self.outputs.user_emb = true,
            Ok(proto::Output::ItemEmb) => self.outputs.item_emb = true,
            // There may be millions, and formatting one costs more than reading it.
            _ if self.violations.is_full() => return false,
            Ok(proto::Output::Unspecified) | Err(_) => {
                let field = format!("outputs[{}]", self.n);
                self.violations.add(field, format!("{value} is not an output, use 1 to 4"));
            }
        }
        self.n += 1;
        true
    }

    fn wanted(&self) -> Outputs {
        if self.n == 0 { Outputs { mid_emb: true, ..Outputs::default() } } else { self.outputs }
    }
}

/// What a request says the user did with the history items. Entries beyond the bound are counted and not stored.
#[derive(Default)]
struct HistoryActions {
    max: usize,
    n: usize,
    actions: Vec<Action>,
    violations: Violations,
}

impl HistoryActions {
    /// Adds one value. False if no more need to be read.
    fn add(&mut self, value: i32) -> bool {
        // The domain's actions are in the order of the wire's numbers.
        let action = usize::try_from(value).ok().and_then(|number| Action::ALL.get(number));
        match action {
            Some(action) if self.n < self.max => self.actions.push(*action),
            Some(_) => {}
            None if self.violations.is_full() => return false,
            None => {
                let field = format!("history_actions[{}]", self.n);
                self.violations.add(field, format!("{value} is not an action, use 0 to 8"));
            }
        }
        self.n += 1;
        true
    }
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

/// The header that carries the id of a request, in either direction.
pub const REQUEST_ID: &str = "x-request-id";
const MAX_REQUEST_ID_BYTES: usize = 256;

/// The caller's own id of the request: visible ASCII without spaces. Any other value is treated as absent.
pub fn request_id(headers: &HeaderMap) -> Option<&str> {
    let id = headers.get(REQUEST_ID)?.as_bytes();
    let is_id = (1..=MAX_REQUEST_ID_BYTES).contains(&id.len()) && id.iter().all(u8::is_ascii_graphic);
    std::str::from_utf8(id).ok().filter(|_| is_id)
}

/// The caller's budget, its `grpc-timeout`: up to eight digits and a unit. Any other value is treated as absent.
pub fn timeout(headers: &HeaderMap) -> Option<Duration> {
    let budget = parse_timeout(headers.get("grpc-timeout")?.to_str().ok()?)?;
    Some(budget.min(MAX_BUDGET))
}

fn parse_timeout(value: &str) -> Option<Duration> {
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
