//! Which code may name which: the dependency directions of the workspace, read from its manifests and sources.
//!
//! Sources are read as tokens, so that comments and strings do not count and groups in `use` do; what is compiled for
//! tests only is left out.

mod rules;
mod tokens;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

pub use rules::{CRATES, CrateRule, MODULES, ModuleRule};
pub use tokens::{code_lines, is_unsafe, paths};

/// A source file and the module that it is.
#[derive(Clone, Debug)]
pub struct Source {
    /// Path relative to the workspace.
    pub file: PathBuf,
    /// Folder of the crate relative to the workspace, such as `worker/kernels`.
    pub package: String,
    /// Module path inside the crate; empty for the root.
    pub module: Vec<String>,
    /// The text.
    pub text: String,
}

impl Source {
    /// The source of a module, for a file `src/a/b.rs` given as `a/b.rs`.
    pub fn new(package: &str, file: &str, text: &str) -> Self {
        let stem = file.trim_end_matches(".rs");
        let parts = stem.split('/').filter(|part| !matches!(*part, "lib" | "main" | "mod"));
        Self {
            file: Path::new(package).join("src").join(file),
            package: package.to_owned(),
            module: parts.map(str::to_owned).collect(),
            text: text.to_owned(),
        }
    }

    /// Every path that the source names, those of its own crate written `crate::…`.
    pub fn names(&self) -> BTreeSet<String> {
        paths(&self.text).into_iter().map(|path| self.resolve(&path)).collect()
    }

    /// Turns `self::` and `super::` into paths from the crate's root.
    fn resolve(&self, path: &str) -> String {
        let mut segments: Vec<&str> = path.split("::").collect();
        let mut here: Vec<&str> = self.module.iter().map(String::as_str).collect();
        if !matches!(segments.first(), Some(&("self" | "super"))) {
            return path.to_owned();
        }
        while matches!(segments.first(), Some(&("self" | "super"))) {
            if segments.remove(0) == "super" {
                here.pop();
            }
        }
        let all: Vec<&str> = std::iter::once("crate").chain(here).chain(segments).collect();
        all.join("::")
    }
}

/// The sources of the crates in a workspace, without files that are compiled for tests only.
///
/// # Errors
/// When a file cannot be read.
pub fn sources(workspace: &Path) -> std::io::Result<Vec<Source>> {
    let mut found = Vec::new();
    for rule in CRATES {
        let root = workspace.join(rule.folder).join("src");
        let mut folders = vec![root.clone()];
        while let Some(folder) = folders.pop() {
            if !folder.is_dir() {
                continue;
            }
            for entry in fs::read_dir(&folder)? {
                let path = entry?.path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|extension| extension == "rs") {
                    let file = path.strip_prefix(&root).unwrap_or(&path).to_string_lossy().replace('\\', "/");
                    found.push(Source::new(rule.folder, &file, &fs::read_to_string(&path)?));
                }
            }
        }
    }
    let for_tests: Vec<(String, Vec<String>)> = found.iter().flat_map(test_modules).collect();
    found.retain(|source| {
        !for_tests.iter().any(|(package, module)| *package == source.package && source.module.starts_with(module))
    });
    found.sort_by(|a, b| a.file.cmp(&b.file));
    Ok(found)
}

/// The modules that a source declares for tests only, each with its package.
fn test_modules(source: &Source) -> Vec<(String, Vec<String>)> {
    let lines: Vec<&str> = source.text.lines().map(str::trim).collect();
    let pairs = lines.windows(2).filter(|pair| pair[0] == "#[cfg(test)]");
    let names =
        pairs.filter_map(|pair| pair[1].trim_start_matches("pub(crate) ").strip_prefix("mod ")?.strip_suffix(';'));
    names.map(|name| (source.package.clone(), [source.module.clone(), vec![name.to_owned()]].concat())).collect()
}

/// What a source names and must not: sentences.
pub fn violations_of(source: &Source) -> Vec<String> {
    let Some(module) = source.module.first() else { return Vec::new() };
    let Some(rule) = MODULES.iter().find(|rule| rule.package == source.package && rule.module == module) else {
        return Vec::new();
    };
    let names = source.names();
    let broken = names.iter().filter_map(|name| rule.forbids(name).map(|why| (name, why)));
    broken.map(|(name, why)| format!("{}: names {name}: {why}", source.file.display())).collect()
}

/// Crates that depend on crates of the workspace which they must not know: sentences. `edges` are pairs of package name
/// and dependency.
pub fn violations_of_manifests(edges: &[(String, String)]) -> Vec<String> {
    let folder = |name: &str| CRATES.iter().find(|rule| rule.name == name);
    let broken = edges.iter().filter_map(|(package, dependency)| {
        folder(dependency)?;
        let Some(rule) = folder(package) else {
            return Some(format!("{package}: not in the list of crates: add it with what it may depend on"));
        };
        let allowed = rule.may_use.is_none_or(|allowed| allowed.contains(&dependency.as_str()));
        (!allowed)
            .then(|| format!("{package} depends on {dependency}: it may know {:?} only", rule.may_use.unwrap_or(&[])))
    });
    broken.collect()
}

/// Files outside of the one crate for it that contain `unsafe`.
pub fn unsafe_outside_kernels(sources: &[Source]) -> Vec<String> {
    let outside = sources.iter().filter(|source| source.package != "worker/kernels" && is_unsafe(&source.text));
    outside.map(|source| format!("{}: unsafe code belongs to worker/kernels", source.file.display())).collect()
}

/// Files with more lines of code before their tests than a reader likes, longest first.
pub fn long_files(sources: &[Source], limit: usize) -> Vec<(String, usize)> {
    let lengths = sources.iter().map(|source| (source.file.display().to_string(), code_lines(&source.text)));
    let mut long: Vec<(String, usize)> = lengths.filter(|(_, lines)| *lines > limit).collect();
    long.sort_by_key(|(_, lines)| std::cmp::Reverse(*lines));
    long
}

/// The modules of a crate and the sibling modules that each names.
pub fn module_edges(sources: &[Source], package: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for source in sources.iter().filter(|source| source.package == package) {
        let Some(module) = source.module.first() else { continue };
        let siblings = source.names().into_iter().filter_map(|name| {
            let sibling = name.strip_prefix("crate::")?.split("::").next()?.to_owned();
            (sibling != *module).then_some(sibling)
        });
        edges.entry(module.clone()).or_default().extend(siblings);
    }
    edges
}
