//! The one export of a server.

use std::sync::Arc;

/// Longest string of the protocol in bytes (proto.md, "Values").
pub const MAX_NAME: usize = 4096;

/// What the export is called. Clones are cheap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    name: Arc<str>,
    description: Option<Arc<str>>,
}

impl Export {
    /// An export; the empty name that clients ask for by default means it too.
    ///
    /// Strings longer than [`MAX_NAME`] bytes are cut at a character's end.
    pub fn new(name: &str) -> Self {
        Self { name: clip(name).into(), description: None }
    }

    /// Adds a description for people.
    #[must_use]
    pub fn described_as(mut self, description: &str) -> Self {
        self.description = Some(clip(description).into());
        self
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its description for people.
    pub fn description(&self) -> Option<&str> {
        self.description.as_deref()
    }

    /// Whether a client that asks for `name` means this export.
    pub fn answers_to(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.name.as_bytes()
    }
}

/// The longest start of `text` that the protocol can carry.
pub(crate) fn clip(text: &str) -> &str {
    let end = (0..=MAX_NAME.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    text.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_empty_name_and_its_own_mean_the_export() {
        let export = Export::new("disk");
        assert!(export.answers_to(b"") && export.answers_to(b"disk"));
        assert!(!export.answers_to(b"dis") && !export.answers_to(b"\xff"));
    }

    #[test]
    fn a_string_is_cut_between_characters() {
        assert_eq!(clip(&"x".repeat(4096)).len(), 4096);
        assert_eq!(clip(&"x".repeat(4097)).len(), 4096);
        assert_eq!(clip(&"\u{20ac}".repeat(2000)).len(), 4095);
    }
}
