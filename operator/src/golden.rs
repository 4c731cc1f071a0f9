//! Comparison of generated text with a checked-in file.

use std::path::Path;

/// Fails when `text` is not what the file says; with `ERNIE_REWRITE=1` in the environment the file is written instead.
pub(crate) fn check(path: &Path, text: &str) {
    if std::env::var_os("ERNIE_REWRITE").is_some() {
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("the folder is made");
        std::fs::write(path, text).expect("the golden file is written");
        return;
    }
    let wanted = std::fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().zip(wanted.lines()).position(|(a, b)| a != b);
    let differs = line.or_else(|| (text != wanted).then(|| text.lines().count().min(wanted.lines().count())));
    if let Some(line) = differs {
        panic!(
            "{} line {}: generated {:?}, checked in {:?}; if the change is meant, run again with ERNIE_REWRITE=1",
            path.display(),
            line + 1,
            text.lines().nth(line).unwrap_or("(end)"),
            wanted.lines().nth(line).unwrap_or("(end)"),
        );
    }
}
