//! What a verb that failed says, on one line, and the exit status that goes with it.

use std::error::Error;
use std::fmt;

/// Exit status of a failed command. Usage errors (2) are clap's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    Failed = 1,
    NoTransport = 3,
}

/// A failure whose text is ready to be printed after `vdisk: <verb> <image>: `.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    text: String,
}

pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self { exit: Exit::Failed, text: one_line(&without_errno(&text.into())) }
    }

    pub(crate) fn no_transport(text: impl Into<String>) -> Self {
        Self { exit: Exit::NoTransport, ..Self::new(text) }
    }

    /// The error and all that caused it.
    pub(crate) fn from_error(error: &(dyn Error + 'static)) -> Self {
        Self::new(chain(error))
    }

    /// The error and all that caused it, after what was being done.
    pub(crate) fn doing(what: impl fmt::Display, error: &(dyn Error + 'static)) -> Self {
        Self::new(format!("{what}: {}", chain(error)))
    }

    /// Adds what the user can do about it, in parentheses.
    pub(crate) fn hint(mut self, hint: impl fmt::Display) -> Self {
        self.text = one_line(&format!("{} ({hint})", self.text));
        self
    }

    pub(crate) fn with_exit(self, exit: Exit) -> Self {
        Self { exit, ..self }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The texts of an error and of its causes, each once, joined by ": ", without Rust's "(os error 2)".
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = link(error);
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = link(cause);
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {}", without_name(&text, &cause_text));
        }
        next = cause.source();
    }
    text
}

/// What a cause says without the name in quotes that it begins with, if the text before it ends with that.
fn without_name<'a>(text: &str, cause: &'a str) -> &'a str {
    let name = text.rfind(" \"").map_or("", |at| &text[at + 1..]);
    let rest = cause.strip_prefix(name).filter(|_| name.len() > 1 && name.ends_with('"'));
    rest.map_or(cause, |rest| rest.trim_start_matches([':', ' ']))
}

fn link(error: &(dyn Error + 'static)) -> String {
    without_errno(&error.to_string())
}

fn without_errno(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(" (os error ") {
        let Some(end) = rest[at..].find(')') else { break };
        kept.push_str(&rest[..at]);
        rest = &rest[at + end + 1..];
    }
    kept + rest
}

/// File names and image contents may hold anything: nothing of it reaches the terminal but as one line.
pub(crate) fn one_line(text: &str) -> String {
    if !text.contains(char::is_control) {
        return text.to_owned();
    }
    text.chars().fold(String::with_capacity(text.len()), |mut line, c| {
        match c {
            c if c.is_control() => line.extend(c.escape_default()),
            c => line.push(c),
        }
        line
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[derive(Debug)]
    struct Layer(&'static str, Option<Box<dyn Error>>);

    impl fmt::Display for Layer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
    }

    impl Error for Layer {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.1.as_deref()
        }
    }

    #[test]
    fn prints_the_chain_once_and_without_errno() {
        let host = io::Error::from_raw_os_error(2);
        let open = Layer("open \"d-s002.vmdk\"", Some(Box::new(host)));
        let extent = Layer("extent 2", Some(Box::new(open)));
        assert_eq!(chain(&extent), "extent 2: open \"d-s002.vmdk\": No such file or directory");
    }

    #[test]
    fn a_name_that_the_cause_repeats_is_said_once() {
        for (cause, said) in [
            ("\"../a b\": No such file", "No such file"),
            ("\"../a b\" leaves the directory", "leaves the directory"),
            ("\"other\": No such file", "\"other\": No such file"),
        ] {
            let host = io::Error::other(cause);
            let open = Layer("extent 2: open \"../a b\"", Some(Box::new(host)));
            assert_eq!(chain(&open), format!("extent 2: open \"../a b\": {said}"));
        }
    }

    #[test]
    fn a_cause_that_the_outer_text_ends_with_is_not_repeated() {
        let inner = Layer("bad magic", None);
        assert_eq!(chain(&Layer("header: bad magic", Some(Box::new(inner)))), "header: bad magic");
    }

    #[test]
    fn control_characters_of_a_name_stay_on_the_line() {
        assert_eq!(Failure::new("open \"a\nb\u{1b}[2J\"").to_string(), "open \"a\\nb\\u{1b}[2J\"");
    }

    #[test]
    fn a_hint_follows_in_parentheses() {
        assert_eq!(Failure::new("busy").hint("vdisk list").to_string(), "busy (vdisk list)");
    }
}
