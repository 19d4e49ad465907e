//! Writes the digests of bundles into the text of a config, and leaves the rest of the text as it is.
//!
//! A bundle behind a URL may be replaced by another one. Where a config must give the same models again, its text has to name
//! their digests.

use super::{
    fault::ConfigError,
    keys::{MODEL_BUNDLE, MODEL_DIGEST, MODEL_NAME},
};
use std::path::Path;
use toml_edit::{DocumentMut, Item, TableLike, value};

/// Adds `digest` to every model of `text` whose bundle is a URL without one. `digest_of` gives the digest by the model's
/// name. The error names `file`.
pub fn pin_bundles(text: &str, file: &Path, digest_of: impl Fn(&str) -> Option<String>) -> Result<String, ConfigError> {
    let syntax = |error: toml_edit::TomlError| ConfigError::Syntax {
        path: file.to_path_buf(),
        reason: error.message().replace('\n', " "),
    };
    let mut document: DocumentMut = text.parse().map_err(syntax)?;
    let mut is_pinned = false;
    for model in models(&mut document) {
        let written = |key: &str| model.get(key).and_then(Item::as_str);
        let is_url = written(MODEL_BUNDLE.description.last_part()).is_some_and(|bundle| bundle.contains("://"));
        let digest = written(MODEL_NAME.description.last_part()).and_then(&digest_of);
        let key = MODEL_DIGEST.description.last_part();
        if let Some(digest) = digest.filter(|_| is_url && !model.contains_key(key)) {
            model.insert(key, value(digest));
            is_pinned = true;
        }
    }
    Ok(if is_pinned { document.to_string() } else { text.to_owned() })
}

/// The entries of `models`, written as `[[models]]` or as inline tables.
fn models(document: &mut DocumentMut) -> Vec<&mut dyn TableLike> {
    match document.get_mut("models") {
        Some(Item::ArrayOfTables(tables)) => tables.iter_mut().map(|table| table as &mut dyn TableLike).collect(),
        Some(Item::Value(toml_edit::Value::Array(entries))) => {
            let tables = entries.iter_mut().filter_map(toml_edit::Value::as_inline_table_mut);
            tables.map(|table| table as &mut dyn TableLike).collect()
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pin(text: &str) -> String {
        pin_bundles(text, Path::new("midemb.toml"), |name| (name != "new").then(|| format!("digest-of-{name}")))
            .unwrap()
    }

    #[test]
    fn a_bundle_behind_a_url_is_pinned_and_the_rest_stays_as_it_was_written() {
        let text = "# ours\n[routing]\nsalt = 'x' # kept\n\n[[models]] # first\nname = \"a\"\nbundle = \"s3://b/a\"\nshare = 90\n\n\
                    [[models]]\nname = \"b\"\nbundle = \"folder\"\nshare = 10\n";
        assert_eq!(pin(text), text.replace("share = 90\n", "share = 90\ndigest = \"digest-of-a\"\n"));
        assert_eq!(pin(&pin(text)), pin(text), "a digest was replaced");
    }

    #[test]
    fn models_in_inline_tables_are_pinned_too() {
        let text =
            "models = [{ name = \"a\", bundle = \"https://h/a\" }, { name = \"new\", bundle = \"https://h/n\" }]\n";
        let models: toml::Table = pin(text).parse().unwrap();
        let digest = |i: usize| models["models"][i].get("digest").map(|digest| digest.as_str().unwrap().to_owned());
        assert_eq!((digest(0), digest(1)), (Some("digest-of-a".to_owned()), None));
    }

    #[test]
    fn a_text_with_nothing_to_pin_is_returned_as_it_is() {
        for text in ["", "a=1", "models = 3\r\n", "[[models]]\r\nname='a'\r\nbundle='x'\r\n"] {
            assert_eq!(pin(text), text);
        }
    }
}
