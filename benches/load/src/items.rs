//! Made-up items.

use fastrand::Rng;
use midemb_client::proto::{Item, ItemText};

const WORDS: &[&str] = &[
    "silver", "river", "night", "garden", "winter", "paper", "lantern", "ocean", "copper", "mountain", "glass",
    "summer", "harbour", "velvet", "thunder", "orchard", "amber", "station", "violet", "desert", "island", "crystal",
    "forest", "echo",
];

/// `n` items whose texts are about as long as a film's and whose ids start with `prefix`.
pub(crate) fn made_up(n: usize, prefix: &str, rng: &mut Rng) -> Vec<Item> {
    let mut item =
        |i: usize| Item { id: format!("{prefix}-{i}"), text: Some(made_up_text(&format!("{prefix} {i}"), rng)) };
    (0..n).map(&mut item).collect()
}

/// A text about as long as a film's, with `tag` in its title.
pub(crate) fn made_up_text(tag: &str, rng: &mut Rng) -> ItemText {
    let mut words = |n: usize| (0..n).map(|_| WORDS[rng.usize(..WORDS.len())]).collect::<Vec<_>>().join(" ");
    ItemText { title: format!("{} {tag}", words(4)), category: words(3), ..ItemText::default() }
}

/// `n` items that no server has seen.
pub(crate) fn cold(n: usize) -> Vec<Item> {
    let mut rng = Rng::new();
    made_up(n, &format!("cold-{}", rng.u64(..)), &mut rng)
}

/// The item without its text.
pub(crate) fn id_alone(item: &Item) -> Item {
    Item { id: item.id.clone(), text: None }
}
