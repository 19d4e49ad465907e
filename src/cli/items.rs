//! Items from a JSONL file: one `{"id": ..., "text": {...}}` per line.

use crate::domain::TextFields;
use anyhow::{Context, bail};
use midemb_client::proto;
use serde::Deserialize;
use std::{fs, path::Path};

/// One line of the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Item {
    pub(super) id: String,
    #[serde(default)]
    pub(super) text: Option<TextFields>,
}

/// Reads all items of a file. An error names the line.
pub(super) fn read(path: &Path) -> anyhow::Result<Vec<Item>> {
    let text = fs::read_to_string(path).with_context(|| format!("items {}", path.display()))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let items: Vec<Item> = lines
        .map(|(i, line)| serde_json::from_str(line).with_context(|| format!("{} line {}", path.display(), i + 1)))
        .collect::<anyhow::Result<_>>()?;
    if items.is_empty() {
        bail!("{} holds no items", path.display());
    }
    Ok(items)
}

/// The item as a message.
pub(super) fn message(item: &Item) -> proto::Item {
    let text = item.text.clone().map(|text| proto::ItemText {
        title: text.title,
        category: text.category,
        brand: text.brand,
        price: text.price,
        keywords: text.keywords,
        attributes: text.attributes,
    });
    proto::Item { id: item.id.clone(), text }
}
