//! Different texts have different digests; the template renders the bytes that Jinja2 rendered in training.

use super::*;
use proptest::prelude::*;
use serde::Deserialize;
use std::time::{Duration, Instant};

#[derive(Deserialize)]
struct GoldenFile {
    template: String,
    cases: Vec<GoldenCase>,
}

#[derive(Deserialize)]
struct GoldenCase {
    text: ItemText,
    prompt: String,
}

fn golden() -> GoldenFile {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/item_text_golden.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn renders_the_same_bytes_as_jinja2() {
    let golden = golden();
    let template = Template::new(&golden.template).unwrap();
    assert!(golden.cases.len() >= 15, "only {} cases", golden.cases.len());
    for case in golden.cases {
        assert_eq!(template.render(&case.text).unwrap(), case.prompt, "{:?}", case.text);
    }
}

#[test]
fn a_template_that_does_not_compile_or_names_an_unknown_field_is_refused() {
    let error = Template::new("{% if title %}").unwrap_err().to_string();
    assert!(error.starts_with("item text template: "), "{error}");
    assert!(Template::new("{{ colour }}").unwrap().render(&ItemText::default()).is_err());
}

/// A template could keep a push, and every push after it, waiting for good.
#[test]
fn a_template_whose_loops_do_not_end_is_an_error() {
    let loops = "{% for a in range(10000) %}".repeat(4) + &"{% endfor %}".repeat(4);
    for source in [loops.as_str(), "{{ 'x' * 10000000000 }}"] {
        let start = Instant::now();
        let error = Template::new(source).unwrap().render(&ItemText::titled("a")).unwrap_err().to_string();
        assert_eq!(
            error, "item text template: one text takes more than 20000000 steps, make its loops shorter",
            "{source}"
        );
        assert!(start.elapsed() < Duration::from_secs(60), "{source}: {:?}", start.elapsed());
    }
}

/// The most list entries that fit into the largest `limits.max_text_bytes`.
#[test]
fn the_longest_text_is_rendered() {
    let golden = golden();
    let entries = vec!["k"; 1 << 18];
    let text = ItemText::new(["a", "b", "c", "d"], &entries, &entries);
    assert!(text.n_bytes() >= 1 << 20);
    Template::new(&golden.template).unwrap().render(&text).unwrap();
    let by_hand = "{{ title }}{% for k in keywords %}{% if not loop.first %}, {% endif %}{{ k }}{% endfor %}\
                   {% for a in attributes %}{% if a %}{{ a | trim }}; {% endif %}{% endfor %}";
    Template::new(by_hand).unwrap().render(&text).unwrap();
}

#[test]
fn moving_a_letter_between_fields_changes_the_digest() {
    let digest =
        |single, keywords: &[&str], attributes: &[&str]| TextDigest::of(&ItemText::new(single, keywords, attributes));
    assert_ne!(digest(["ab", "c", "", ""], &[], &[]), digest(["a", "bc", "", ""], &[], &[]));
    assert_ne!(digest([""; 4], &["a"], &[]), digest([""; 4], &[], &["a"]));
    assert_ne!(digest([""; 4], &["ab"], &[]), digest([""; 4], &["a", "b"], &[]));
}

#[test]
fn the_length_limit_applies_to_all_fields_together() {
    let text = ItemText::new(["aaaaaa", "", "", ""], &["bbbbb"], &[]);
    assert_eq!(check(&text, 12), Ok(()));
    assert_eq!(check(&text, 11), Err(TextFault::TooLong { max: 11 }));
    let empty_keywords = ItemText::new(["a", "", "", ""], &[""; 100], &[]);
    assert_eq!(check(&empty_keywords, 100), Err(TextFault::TooLong { max: 100 }));
    assert_eq!(check(&ItemText::new([""; 4], &[""], &[]), 10), Err(TextFault::Empty));
    assert_eq!(check(&ItemText::default(), 10), Err(TextFault::Empty));
}

fn any_fields() -> impl Strategy<Value = TextFields> {
    let words = || prop::collection::vec("\\PC{0,8}", 0..3);
    ("\\PC{0,12}", "\\PC{0,12}", "\\PC{0,6}", "\\PC{0,6}", words(), words()).prop_map(
        |(title, category, brand, price, keywords, attributes)| TextFields {
            title,
            category,
            brand,
            price,
            keywords,
            attributes,
        },
    )
}

proptest! {
    #[test]
    fn digests_are_equal_if_and_only_if_texts_are(a in any_fields(), b in any_fields()) {
        let digest = |fields: &TextFields| TextDigest::of(&ItemText::from(fields));
        prop_assert_eq!(digest(&a) == digest(&b), a == b);
        prop_assert_eq!(digest(&a), digest(&a.clone()));
    }

    #[test]
    fn a_text_keeps_every_field(fields in any_fields()) {
        let text = ItemText::from(&fields);
        prop_assert_eq!(&TextFields::from(&text), &fields);
        let json = serde_json::to_string(&text).unwrap();
        prop_assert_eq!(&json, &serde_json::to_string(&fields).unwrap());
        prop_assert_eq!(serde_json::from_str::<ItemText>(&json).unwrap(), text);
    }
}
