//! What decoding accepts, what it refuses, and how it names the violations.

use super::*;
use midemb_client::proto;
use proptest::prelude::*;
use prost::Message;
use std::{collections::BTreeSet, ops::RangeInclusive};

const LIMITS: Limits = Limits {
    max_candidates: 3,
    max_history: 2,
    max_text_bytes: 100,
    max_message_bytes: 1 << 20,
    max_in_flight: 1,
    max_encoding: 1,
    read: Duration::from_secs(1),
    write: Duration::from_secs(1),
    max_receiving_bytes: 1 << 20,
    max_decoded_bytes: 1 << 20,
    max_unsent_bytes: 1 << 20,
    max_warm_up_bytes: 1 << 20,
    default_deadline: Duration::from_secs(1),
};

fn item(id: &str) -> proto::Item {
    proto::Item { id: id.to_owned(), text: None }
}

fn valid() -> proto::GetMidEmbRequest {
    proto::GetMidEmbRequest { user_id: "u".to_owned(), candidates: vec![item("a")], ..Default::default() }
}

fn raw(message: &impl Message) -> RawMessage {
    RawMessage(message.encode_to_vec().into())
}

fn violations(message: proto::GetMidEmbRequest) -> Vec<String> {
    match request(&raw(&message), Instant::now(), &LIMITS) {
        Err(Error::InvalidArgument(violations)) => {
            violations.into_iter().map(|v| format!("{}: {}", v.field, v.description)).collect()
        }
        other => panic!("expected violations, got {other:?}"),
    }
}

#[test]
fn the_defaults_are_mid_emb_in_f32_from_the_routed_model() {
    let message = raw(&valid());
    let decoded = request(&message, Instant::now(), &LIMITS).unwrap();
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
        history_actions: vec![1, -1, 3, 9],
        ..Default::default()
    };
    assert_eq!(
        violations(message),
        [
            "candidates: has 4 items, at most 3 are allowed",
            "history: has 3 items, at most 2 are allowed",
            "candidates[1].id: is empty",
            "history_actions: has 4 entries, it must be empty or have one per history item (3)",
            "outputs[1]: 99 is not an output, use 1 to 4",
            "outputs[2]: 0 is not an output, use 1 to 4",
            "history_actions[1]: -1 is not an action, use 0 to 8",
            "history_actions[3]: 9 is not an action, use 0 to 8",
            "dtype: 99 is not an element type, use 0 to 3",
        ]
    );
    let empty = proto::GetMidEmbRequest { candidates: Vec::new(), ..valid() };
    assert_eq!(violations(empty), ["candidates: is empty, at least one is required"]);
}

#[test]
fn an_answer_lists_a_bounded_number_of_violations() {
    assert_eq!(violations(proto::GetMidEmbRequest { outputs: vec![9; 1000], ..valid() }).len(), MAX_VIOLATIONS);
}

#[test]
fn timeouts_are_parsed_as_grpc_defines_them() {
    let sent =
        |value: &str| timeout(&HeaderMap::from_iter([("grpc-timeout".parse().unwrap(), value.parse().unwrap())]));
    assert_eq!(sent("250m"), Some(Duration::from_millis(250)));
    assert_eq!(sent("7S"), Some(Duration::from_secs(7)));
    assert_eq!(sent("99999999H"), Some(MAX_BUDGET));
    for invalid in ["", "m", "-1S", "1.5S", "123456789S", "5", "5x", "5é"] {
        assert_eq!(sent(invalid), None, "{invalid}");
    }
    assert_eq!(timeout(&HeaderMap::new()), None);
}

/// The bytes that a decoded list of items occupies.
fn item_bytes(items: &[Item<'_>]) -> usize {
    let text_bytes =
        |item: &Item<'_>| item.text.as_ref().and_then(|text| text.as_ref().ok()).map_or(0, ItemText::heap_bytes);
    items.iter().map(|item| size_of::<Item<'_>>() + text_bytes(item)).sum()
}

#[test]
fn no_message_needs_more_than_four_times_its_size() {
    let limits = Limits { max_candidates: 10_000, max_history: 1000, max_text_bytes: 8192, ..LIMITS };
    let page =
        |candidate: proto::Item, n: usize| raw(&proto::GetMidEmbRequest { candidates: vec![candidate; n], ..valid() });
    let with_keywords = |keyword: &str, n: usize| proto::Item {
        id: "a".to_owned(),
        text: Some(proto::ItemText { keywords: vec![keyword.to_owned(); n], ..Default::default() }),
    };
    let hostile = [
        ("one item of empty keywords", page(with_keywords("", 1 << 20), 1)),
        ("items of one-letter keywords, as many as are allowed", page(with_keywords("k", 4000), 200)),
        ("items of empty keywords", page(with_keywords("", 8000), 100)),
        ("empty items", page(proto::Item::default(), 1 << 20)),
        ("zeros in place of outputs", raw(&proto::GetMidEmbRequest { outputs: vec![0; 1 << 20], ..valid() })),
    ];
    for (what, message) in hostile {
        assert!(message.0.len() >= 1 << 20, "{what}: only {} bytes", message.0.len());
        let parts = Parts::read(&message, &limits).unwrap();
        let n_bytes = item_bytes(&parts.candidates.items) + item_bytes(&parts.history.items);
        assert!(n_bytes <= 4 * message.0.len(), "{what}: {n_bytes} bytes for {} on the wire", message.0.len());
        assert!(parts.outputs.violations.0.len() <= MAX_VIOLATIONS, "{what}");
    }
    let too_many = raw(&proto::WarmItemsRequest { items: vec![proto::Item::default(); MAX_WARM_ITEMS + 1] });
    let refused = warm_items(&too_many, &limits).unwrap_err().to_string();
    assert_eq!(refused, "items: more than 100000 items in one message");
}

fn text(max_len: usize) -> impl Strategy<Value = String> {
    prop::collection::vec(any::<char>(), 0..=max_len).prop_map(String::from_iter)
}

fn item_text() -> impl Strategy<Value = proto::ItemText> {
    let list = || prop::collection::vec(text(4), 0..4);
    (text(8), text(8), text(8), text(8), list(), list()).prop_map(
        |(title, category, brand, price, keywords, attributes)| proto::ItemText {
            title,
            category,
            brand,
            price,
            keywords,
            attributes,
        },
    )
}

/// An identifier that is seldom empty.
fn id() -> impl Strategy<Value = String> {
    prop_oneof![1 => Just(String::new()), 15 => text(6).prop_map(|rest| format!("i{rest}"))]
}

fn an_item() -> impl Strategy<Value = proto::Item> {
    (id(), prop::option::of(item_text())).prop_map(|(id, text)| proto::Item { id, text })
}

/// A list of items: mostly of an allowed length, sometimes of a length just outside, seldom far too long.
fn item_list(allowed: RangeInclusive<usize>) -> impl Strategy<Value = Vec<proto::Item>> {
    let max = *allowed.end();
    let length = prop_oneof![12 => allowed, 1 => Just(0), 1 => Just(max + 1), 1 => max + 2..max + 30];
    length.prop_flat_map(|n| prop::collection::vec(an_item(), n))
}

/// The number of an enum: mostly one of `known`, sometimes one beside them, seldom any other.
fn number(known: RangeInclusive<i32>) -> impl Strategy<Value = i32> {
    let (below, above) = (known.start() - 1, known.end() + 1);
    prop_oneof![20 => known, 1 => Just(below), 1 => Just(above), 1 => any::<i32>()]
}

fn message() -> impl Strategy<Value = proto::GetMidEmbRequest> {
    let model = prop_oneof![Just(String::new()), text(6)];
    let outputs = prop::collection::vec(number(1..=4), 0..5);
    let (history, candidates) = (item_list(0..=LIMITS.max_history), item_list(1..=LIMITS.max_candidates));
    (
        id(),
        history,
        candidates,
        model,
        outputs,
        number(0..=3),
        prop::collection::vec(number(0..=8), 0..5),
        any::<bool>(),
    )
        .prop_map(|(user_id, history, candidates, model, outputs, dtype, mut history_actions, one_each)| {
            if one_each {
                history_actions.resize(history.len(), 3);
            }
            proto::GetMidEmbRequest { user_id, history, candidates, model, outputs, dtype, history_actions }
        })
}

/// The fields that violate the contract of `midemb.proto`, written down apart from the code under test.
fn violated_fields(message: &proto::GetMidEmbRequest) -> BTreeSet<String> {
    let mut fields = BTreeSet::new();
    let n_actions = message.history_actions.len();
    if n_actions > 0 && n_actions != message.history.len() {
        fields.insert("history_actions".to_owned());
    }
    for (i, action) in message.history_actions.iter().enumerate() {
        if !(0..=8).contains(action) {
            fields.insert(format!("history_actions[{i}]"));
        }
    }
    if !(1..=LIMITS.max_candidates).contains(&message.candidates.len()) {
        fields.insert("candidates".to_owned());
    }
    if message.history.len() > LIMITS.max_history {
        fields.insert("history".to_owned());
    }
    for (name, items) in [("candidates", &message.candidates), ("history", &message.history)] {
        // Items beyond the bound are counted, but not looked at.
        let max = if name == "candidates" { LIMITS.max_candidates } else { LIMITS.max_history };
        for (i, item) in items.iter().enumerate().take(max) {
            if item.id.is_empty() {
                fields.insert(format!("{name}[{i}].id"));
            }
        }
    }
    for (i, output) in message.outputs.iter().enumerate() {
        if !(1..=4).contains(output) {
            fields.insert(format!("outputs[{i}]"));
        }
    }
    if !(0..=3).contains(&message.dtype) {
        fields.insert("dtype".to_owned());
    }
    fields
}

fn assert_same_items(found: &[Item<'_>], sent: &[proto::Item]) {
    assert_eq!(found.len(), sent.len());
    for (found, sent) in found.iter().zip(sent) {
        assert_eq!(found.id, sent.id);
        assert_eq!(found.text.is_some(), sent.text.is_some());
        if let (Some(found), Some(sent)) = (&found.text, &sent.text) {
            let text = ItemText::new(
                [&sent.title, &sent.category, &sent.brand, &sent.price],
                &sent.keywords,
                &sent.attributes,
            );
            let expected = item_text::check(&text, LIMITS.max_text_bytes).map(|()| text);
            assert_eq!(*found, expected);
        }
    }
}

fn assert_same_request(decoded: &Decoded<'_>, sent: &proto::GetMidEmbRequest) {
    let request = &decoded.request;
    assert_eq!(request.user_id, sent.user_id);
    assert_eq!(request.model.unwrap_or_default(), sent.model);
    let actions: Vec<i32> = request.history_actions.iter().map(|action| *action as i32).collect();
    assert_eq!(actions, sent.history_actions);
    assert_same_items(&request.history, &sent.history);
    assert_same_items(&request.candidates, &sent.candidates);
    let has = |number: i32| sent.outputs.contains(&number);
    let outputs =
        Outputs { mid_emb: has(1) || sent.outputs.is_empty(), cvr: has(2), user_emb: has(3), item_emb: has(4) };
    assert_eq!(request.outputs, outputs);
    let dtypes = [DType::F32, DType::F32, DType::F16, DType::Bf16];
    assert_eq!(decoded.dtype, dtypes[sent.dtype as usize]);
}

/// What prost decodes is decoded to the same request. What it refuses is refused, unless the fault is in a part that is not
/// looked at.
fn assert_decodes_as_prost_does(bytes: &[u8]) {
    let message = RawMessage(bytes.to_vec().into());
    let decoded = request(&message, Instant::now(), &LIMITS);
    if let Ok(sent) = proto::GetMidEmbRequest::decode(bytes) {
        match decoded {
            Ok(decoded) => assert_same_request(&decoded, &sent),
            Err(Error::InvalidArgument(violations)) => {
                assert!(violations.iter().all(|violation| violation.field != "request"), "{violations:?}");
            }
            Err(other) => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_message_in_an_unusual_form_is_read_as_protobuf_says() {
    let text = |title: &str| proto::ItemText { title: title.to_owned(), ..Default::default() };
    let keyword = proto::ItemText { keywords: vec!["k".to_owned()], ..Default::default() };
    // An item whose text comes twice, and an unpacked list of outputs with an unknown field between its entries.
    let mut twice = proto::Item { id: "a".to_owned(), text: Some(text("first")) }.encode_to_vec();
    for more in [keyword, text("last")] {
        twice.extend(proto::Item { id: String::new(), text: Some(more) }.encode_to_vec());
    }
    let mut bytes = vec![0x0a, 1, b'u', 0x1a, twice.len() as u8];
    bytes.extend(twice);
    bytes.extend([0x28, 1, 0xf8, 0x07, 5, 0x28, 2]);
    assert!(proto::GetMidEmbRequest::decode(bytes.as_slice()).is_ok());
    let message = RawMessage(bytes.into());
    let decoded = request(&message, Instant::now(), &LIMITS).unwrap().request;
    let text = decoded.candidates[0].text.as_ref().unwrap().as_ref().unwrap();
    assert_eq!((text.title(), text.keywords().collect::<Vec<_>>()), ("last", vec!["k"]));
    assert_eq!(decoded.outputs, Outputs { mid_emb: true, cvr: true, ..Outputs::default() });
}

#[test]
fn bytes_that_are_no_message_are_refused_with_the_reason() {
    let refused =
        |bytes: &[u8]| request(&RawMessage(bytes.to_vec().into()), Instant::now(), &LIMITS).unwrap_err().to_string();
    // The last one is an item with a text in two halves, which are a text only together.
    let halves = [0x1a, 8, 0x12, 3, 0x0a, 2, b'a', 0x12, 1, b'b'];
    for cut in [&[0x0a][..], &[0x0a, 5, b'u'], &[0xff; 11], &[0x1a, 2, 0x0a, 9], &halves] {
        assert_eq!(refused(cut), "request: is not a valid message: it is cut off or damaged", "{cut:?}");
    }
    assert_eq!(refused(&[0x0a, 1, 0xff]), "request: is not a valid message: field 1 is not UTF-8");
    assert_eq!(refused(&[0x08, 1]), "request: is not a valid message: field 1 has the wrong type");
}

proptest! {
    #[test]
    fn a_message_is_accepted_if_it_keeps_the_contract_and_every_violated_field_is_named_if_not(sent in message()) {
        let expected = violated_fields(&sent);
        match request(&raw(&sent), Instant::now(), &LIMITS) {
            Ok(decoded) => {
                prop_assert!(expected.is_empty(), "accepted in spite of {expected:?}");
                assert_same_request(&decoded, &sent);
            }
            Err(Error::InvalidArgument(violations)) => {
                prop_assert!(violations.iter().all(|violation| !violation.description.is_empty()));
                let n_violations = violations.len();
                let found: BTreeSet<String> = violations.into_iter().map(|violation| violation.field).collect();
                prop_assert_eq!(found.len(), n_violations, "a field is named twice");
                prop_assert_eq!(n_violations, expected.len().min(MAX_VIOLATIONS));
                prop_assert!(found.is_subset(&expected), "{:?} are named, {:?} are violated", found, expected);
            }
            Err(other) => prop_assert!(false, "{other:?}"),
        }
    }

    #[test]
    fn a_message_that_is_cut_off_never_panics(sent in message(), part in 0.0..1.0) {
        let bytes = sent.encode_to_vec();
        let n_bytes = (bytes.len() as f64 * part) as usize;
        assert_decodes_as_prost_does(&bytes[..n_bytes]);
    }

    #[test]
    fn items_to_warm_arrive_as_they_were_sent(sent in prop::collection::vec(an_item(), 0..20)) {
        let received = raw(&proto::WarmItemsRequest { items: sent.clone() });
        assert_same_items(&warm_items(&received, &LIMITS).unwrap(), &sent);
    }

    #[test]
    fn decoding_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        assert_decodes_as_prost_does(&bytes);
    }

    #[test]
    fn parsing_a_timeout_never_panics(value in "\\PC{0,12}") {
        let _ = parse_timeout(&value);
    }
}
