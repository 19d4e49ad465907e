//! Different texts have different digests; the template renders the bytes that Jinja2 rendered in training.

use super::*;
use proptest::prelude::*;
use serde::Deserialize;

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

#[test]
fn renders_the_same_bytes_as_jinja2() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/item_text_golden.json");
    let golden: GoldenFile = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
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

#[test]
fn moving_a_letter_between_fields_changes_the_digest() {
    let left = ItemText { title: "ab".into(), category: "c".into(), ..ItemText::default() };
    let right = ItemText { title: "a".into(), category: "bc".into(), ..ItemText::default() };
    assert_ne!(TextDigest::of(&left), TextDigest::of(&right));
    let keyword = ItemText { keywords: vec!["a".into()], ..ItemText::default() };
    let attribute = ItemText { attributes: vec!["a".into()], ..ItemText::default() };
    assert_ne!(TextDigest::of(&keyword), TextDigest::of(&attribute));
}

#[test]
fn the_length_limit_applies_to_all_fields_together() {
    let text = ItemText { title: "a".repeat(6), keywords: vec!["b".repeat(5)], ..ItemText::default() };
    assert_eq!(check(&text, 12), Ok(()));
    assert_eq!(check(&text, 11), Err(TextFault::TooLong { n_bytes: 12, max: 11 }));
    let empty_keywords = ItemText { title: "a".into(), keywords: vec![String::new(); 100], ..ItemText::default() };
    assert_eq!(check(&empty_keywords, 100), Err(TextFault::TooLong { n_bytes: 101, max: 100 }));
    assert_eq!(check(&ItemText { keywords: vec![String::new()], ..ItemText::default() }, 10), Err(TextFault::Empty));
}

fn any_text() -> impl Strategy<Value = ItemText> {
    let words = || prop::collection::vec("\\PC{0,8}", 0..3);
    ("\\PC{0,12}", "\\PC{0,12}", "\\PC{0,6}", "\\PC{0,6}", words(), words()).prop_map(
        |(title, category, brand, price, keywords, attributes)| ItemText {
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
    fn digests_are_equal_if_and_only_if_texts_are(a in any_text(), b in any_text()) {
        prop_assert_eq!(TextDigest::of(&a) == TextDigest::of(&b), a == b);
        prop_assert_eq!(TextDigest::of(&a), TextDigest::of(&a.clone()));
    }
}
