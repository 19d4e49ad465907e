//! Lines as an item's text, through digest, template and tokenizer. The template is the fixture's, which is LEARN's, and is
//! compared with the same words in Rust.
#![no_main]
#![allow(clippy::unwrap_used, reason = "a target that cannot go on says so")]

use libfuzzer_sys::{Corpus, fuzz_target};
use midemb::{
    bundle::load::read_manifest,
    content::Tokenizer,
    domain::{ItemText, TextDigest, TextFields, item_text::Template},
};
use midemb_fuzz::{bundle, with_peak};
use std::sync::LazyLock;

static READER: LazyLock<(Template, Tokenizer)> = LazyLock::new(|| {
    let manifest = read_manifest(bundle()).unwrap().manifest;
    let path = bundle().join(&manifest.encoder.tokenizer);
    let tokenizer = Tokenizer::parse(&std::fs::read(&path).unwrap(), &path, manifest.item_text.max_tokens).unwrap();
    (Template::new(&manifest.item_text.template).unwrap(), tokenizer)
});
/// The fixture's tokenizer has no token beyond.
const N_TOKENS: i64 = 512;

fuzz_target!(|data: &[u8]| -> Corpus {
    let Ok(lines) = std::str::from_utf8(data) else { return Corpus::Reject };
    let fields = item_text(lines);
    let text = ItemText::from(&fields);
    let (template, tokenizer) = &*READER;
    let ((prompt, ids), peak) = with_peak(|| {
        let prompt = template.render(&text).unwrap();
        let ids = tokenizer.encode(&prompt).unwrap();
        (prompt, ids)
    });
    // The tokenizer remembers up to 10,000 words, whatever text they come from.
    assert!(peak <= (1 << 22) + 1000 * data.len(), "{peak} bytes for a text of {}", data.len());
    assert_eq!(prompt, learn_prompt(&fields));
    assert!((1..=tokenizer.max_tokens()).contains(&ids.len()), "{} tokens", ids.len());
    assert!(ids.iter().all(|id| (0..N_TOKENS).contains(id)), "{ids:?}");
    check_digest(&fields);
    Corpus::Keep
});

/// A line is a field, which its first character names; a title if that names none.
fn item_text(lines: &str) -> TextFields {
    let mut text = TextFields::default();
    for line in lines.split('\n') {
        let mut rest = line.chars();
        match rest.next() {
            Some('c') => text.category = rest.as_str().to_owned(),
            Some('b') => text.brand = rest.as_str().to_owned(),
            Some('p') => text.price = rest.as_str().to_owned(),
            Some('k') => text.keywords.push(rest.as_str().to_owned()),
            Some('a') => text.attributes.push(rest.as_str().to_owned()),
            _ => text.title = line.to_owned(),
        }
    }
    text
}

fn learn_prompt(text: &TextFields) -> String {
    let TextFields { title, category, brand, price, keywords, attributes } = text;
    let mut prompt = "The item information is given as follows.".to_owned();
    if !title.is_empty() {
        prompt += &format!(" Item title is \"{title}\".");
    }
    match (category.as_str(), brand.as_str()) {
        ("", "") => {}
        ("", brand) => prompt += &format!(" The brand is \"{brand}\"."),
        (category, "") => prompt += &format!(" This item belongs to \"{category}\"."),
        (category, brand) => prompt += &format!(" This item belongs to \"{category}\" and brand is \"{brand}\"."),
    }
    if !price.is_empty() {
        prompt += &format!(" The price is \"{price}\".");
    }
    let list = |words: &[String]| {
        let words: Vec<&str> = words.iter().map(String::as_str).filter(|word| !word.is_empty()).collect();
        words.join(", ")
    };
    if !list(keywords).is_empty() {
        prompt += &format!(" The keywords of item are \"{}\".", list(keywords));
    }
    if !list(attributes).is_empty() {
        prompt += &format!(" This item supports \"{}\".", list(attributes));
    }
    prompt
}

/// Equal texts have equal digests, also after a trip through JSON, as a snapshot makes it; texts that differ have different ones.
fn check_digest(text: &TextFields) {
    let digest = digest_of(text);
    let again: ItemText = serde_json::from_slice(&serde_json::to_vec(text).unwrap()).unwrap();
    assert_eq!((&TextFields::from(&again), TextDigest::of(&again)), (text, digest));
    let swapped = TextFields { title: text.category.clone(), category: text.title.clone(), ..text.clone() };
    assert_eq!(digest_of(&swapped) == digest, &swapped == text);
    let joined = TextFields { keywords: vec![text.keywords.concat()], ..text.clone() };
    assert_eq!(digest_of(&joined) == digest, &joined == text);
    let moved = TextFields { keywords: text.attributes.clone(), attributes: text.keywords.clone(), ..text.clone() };
    assert_eq!(digest_of(&moved) == digest, &moved == text);
}

fn digest_of(fields: &TextFields) -> TextDigest {
    TextDigest::of(&ItemText::from(fields))
}
