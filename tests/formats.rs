//! docs/formats.md and README.md name tests: they are there.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::path::Path;

/// All Rust sources under a folder, but for what is built.
fn sources(folder: &Path, text: &mut String) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
            sources(&path, text);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            *text += &std::fs::read_to_string(path).unwrap();
        }
    }
}

/// What is between backquotes and looks like the name of a test.
fn names(text: &str) -> impl Iterator<Item = &str> {
    let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    text.split('`').skip(1).step_by(2).filter(move |name| name.matches('_').count() > 2 && name.chars().all(word))
}

#[test]
fn every_test_that_the_texts_name_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut code = String::new();
    for folder in ["crates", "tests"] {
        sources(&root.join(folder), &mut code);
    }
    let formats = std::fs::read_to_string(root.join("docs/formats.md")).unwrap();
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    assert!(names(&formats).count() > 30);
    for name in names(&formats).chain(names(&readme)) {
        assert!(code.contains(&format!("fn {name}(")), "there is no test {name}");
    }
}

/// The table in README.md has a row for each format of docs/formats.md, and each cell there that says yes has a test.
#[test]
fn every_cell_of_the_table_of_formats_has_a_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let rows = |file: &str| {
        let text = std::fs::read_to_string(root.join(file)).unwrap();
        let start = text.find("| format | read | write | discard | check |").unwrap();
        let table: Vec<Vec<String>> = text[start..]
            .lines()
            .take_while(|line| line.starts_with('|'))
            .skip(2)
            .map(|line| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect())
            .collect();
        table
    };
    let (said, tests) = (rows("README.md"), rows("docs/formats.md"));
    assert_eq!(said.len(), tests.len());
    for (said, tests) in said.iter().zip(&tests) {
        assert_eq!((said.len(), &said[0]), (5, &tests[0]));
        for (said, test) in said.iter().zip(tests).skip(1) {
            assert!(names(test).count() > 0 || said == "-", "{}: \"{said}\" has no test, but \"{test}\"", tests[0]);
        }
    }
}
