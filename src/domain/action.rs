//! What a user did with an item.

use serde::{Deserialize, Serialize};
use std::fmt;

/// What a user did with an item of the history.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say it all")]
pub enum Action {
    /// Not known, which is the same as no action at all.
    #[default]
    Unspecified,
    View,
    Click,
    Like,
    Dislike,
    Share,
    Cart,
    Purchase,
    Skip,
}

impl Action {
    /// Every action, in the order of the wire's enum.
    pub const ALL: [Action; 9] = [
        Action::Unspecified,
        Action::View,
        Action::Click,
        Action::Like,
        Action::Dislike,
        Action::Share,
        Action::Cart,
        Action::Purchase,
        Action::Skip,
    ];

    /// The name that manifests use.
    pub fn as_str(self) -> &'static str {
        match self {
            Action::Unspecified => "unspecified",
            Action::View => "view",
            Action::Click => "click",
            Action::Like => "like",
            Action::Dislike => "dislike",
            Action::Share => "share",
            Action::Cart => "cart",
            Action::Purchase => "purchase",
            Action::Skip => "skip",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The numbers by which a user tower reads actions: 0 for [`Action::Unspecified`] and every action that it was not trained with,
/// and one more than its position in the manifest for every other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ActionCodes([u8; Action::ALL.len()]);

impl ActionCodes {
    /// The codes of a tower that was trained with these actions; `None` if it was trained with none.
    pub fn of(trained: &[Action]) -> Option<Self> {
        let mut codes = [0; Action::ALL.len()];
        for (code, action) in (1..).zip(trained) {
            codes[*action as usize] = code;
        }
        (!trained.is_empty()).then_some(ActionCodes(codes))
    }

    /// The code of one action.
    pub fn code(&self, action: Action) -> u8 {
        self.0[action as usize]
    }

    /// The codes of a history of `n_items`, as the user tower reads them. `actions` has one entry per item, or none at all.
    pub fn of_history(&self, actions: &[Action], n_items: usize) -> Vec<i64> {
        let known = actions.iter().copied().chain(std::iter::repeat(Action::Unspecified));
        known.take(n_items).map(|action| i64::from(self.code(action))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_follow_the_manifest_and_everything_else_reads_as_unspecified() {
        let codes = ActionCodes::of(&[Action::Purchase, Action::Like]).unwrap();
        assert_eq!(Action::ALL.map(|action| codes.code(action)), [0, 0, 0, 2, 0, 0, 0, 1, 0]);
        assert_eq!(ActionCodes::of(&[]), None);
    }

    #[test]
    fn a_name_is_read_back_as_its_action() {
        for (i, action) in Action::ALL.into_iter().enumerate() {
            assert_eq!(action as usize, i, "ALL is not in the order of the enum");
            assert_eq!(serde_json::from_str::<Action>(&format!("\"{action}\"")).unwrap(), action);
        }
    }
}
