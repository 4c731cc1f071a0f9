//! The digest of a model folder: that its files are those which somebody meant, to the last bit.
//!
//! It is the SHA-256 of a manifest, which has a line `HEX  NAME` for each file that a worker may read, sorted by name, as
//! `sha256sum` prints them:
//!
//! ```text
//! cd DIR && LC_ALL=C ls | grep -E '\.(jinja|json|model|safetensors)$' | xargs -d '\n' sha256sum | sha256sum
//! ```

use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use ernie_proto::failure::Reason;
use rustix::fs::{Advice, fadvise};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::error::{LoadError, LoadResult};
use super::weights::Progress;

/// Endings of the files that a worker reads. Notes, licences and other formats of the same weights do not count.
pub const ENDINGS: [&str; 4] = ["jinja", "json", "model", "safetensors"];
/// The most files of one folder.
const FILE_LIMIT: usize = 8192;
/// Bytes that are read at a time.
const PIECE: usize = 1 << 20;
/// The most files whose digests a termination message lists; it has 3 KiB.
const TOLD_FILES: usize = 16;

/// The digest of a model folder, written `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, Eq, PartialEq)]
pub struct ModelDigest([u8; 32]);

impl fmt::Display for ModelDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        hexadecimal(&self.0, f)
    }
}

impl fmt::Debug for ModelDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ModelDigest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || "must be sha256: and 64 hexadecimal digits, as `ernie-worker digest --model DIR` prints".to_owned();
        let digits = text.strip_prefix("sha256:").filter(|digits| digits.len() == 64).ok_or_else(wrong)?;
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.as_bytes().as_chunks::<2>().0) {
            let digit = |digit: u8| char::from(digit).to_digit(16).filter(|_| !digit.is_ascii_uppercase());
            let (high, low) = (digit(pair[0]).ok_or_else(wrong)?, digit(pair[1]).ok_or_else(wrong)?);
            *byte = (high << 4 | low) as u8;
        }
        Ok(Self(bytes))
    }
}

fn hexadecimal(bytes: &[u8], to: &mut impl fmt::Write) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(to, "{byte:02x}"))
}

/// A file's name and its SHA-256.
type Entry = (String, [u8; 32]);

/// What a folder's files are. Displayed, it is the text whose SHA-256 is the digest.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Manifest {
    folder: PathBuf,
    entries: Vec<Entry>,
}

impl fmt::Display for Manifest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, digest) in &self.entries {
            hexadecimal(digest, f)?;
            writeln!(f, "  {name}")?;
        }
        Ok(())
    }
}

/// How a folder is read.
pub struct Reading<'a> {
    /// Files that are read at once, at least 1.
    pub threads: usize,
    /// Whether pages leave the page cache as soon as they were read: for limits that weights and files do not fit together.
    pub drop_pages: bool,
    /// Told of progress after every megabyte, by any thread.
    pub report: &'a (dyn Fn(Progress) + Sync),
}

impl Manifest {
    /// Reads all files of a folder that count.
    ///
    /// # Errors
    /// [`LoadError`] when the folder has none, more than 8192, one that is no regular file, or one that cannot be read.
    pub fn of(folder: &Path, how: &Reading<'_>) -> LoadResult<Self> {
        let files = files(folder)?;
        let (next, loaded) = (AtomicUsize::new(0), AtomicU64::new(0));
        let total = files.iter().map(|(_, length)| length).sum();
        let advance = |bytes: usize| {
            let loaded = loaded.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
            (how.report)(Progress { loaded, total });
        };
        let work = || {
            let mut done = Vec::new();
            while let Some((name, _)) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                done.push((name.clone(), hash(&folder.join(name), how.drop_pages, &advance)?));
            }
            Ok(done)
        };
        let threads = how.threads.clamp(1, files.len());
        let mut entries: Vec<Entry> = if threads == 1 { work() } else { side_by_side(threads, &work) }?;
        entries.sort();
        Ok(Self { folder: folder.to_owned(), entries })
    }

    /// The digest of the folder.
    pub fn digest(&self) -> ModelDigest {
        ModelDigest(Sha256::digest(self.to_string()).into())
    }

    /// Compares with the digest that is expected.
    ///
    /// # Errors
    /// [`LoadError`] with [`Reason::DigestMismatch`]; its detail has both digests, and those of the files when they are few.
    pub fn check(&self, expected: ModelDigest) -> LoadResult<()> {
        let found = self.digest();
        if found == expected {
            return Ok(());
        }
        let mut detail = json!({"expected": expected.to_string(), "found": found.to_string()});
        if self.entries.len() <= TOLD_FILES {
            let told = self.entries.iter().map(|(name, digest)| {
                let mut text = String::new();
                // a string takes whatever is written to it
                let _ = hexadecimal(digest, &mut text);
                (name.clone(), Value::from(text))
            });
            detail["files"] = Value::Object(told.collect::<Map<_, _>>());
        }
        let folder = self.folder.display();
        let message = format!(
            "{folder} has the digest {found}, --model-digest is {expected}: a file was changed, added or lost, or the \
             digest is that of another model: copy the model again, or set the digest that `ernie-worker digest --model \
             DIR` prints for a copy that you trust (with --files it prints a line for each file, to find the one that \
             differs)"
        );
        Err(LoadError::new(Reason::DigestMismatch, message).with_detail(detail))
    }
}

/// Runs the same work on several threads and puts their results together.
fn side_by_side(threads: usize, work: &(dyn Fn() -> LoadResult<Vec<Entry>> + Sync)) -> LoadResult<Vec<Entry>> {
    std::thread::scope(|scope| {
        let start = |_| scope.spawn(work);
        let started: Vec<_> = (0..threads).map(start).collect();
        let mut entries = Vec::new();
        for thread in started {
            let done =
                thread.join().map_err(|_| LoadError::new(Reason::Internal, "a thread that hashed files failed"))?;
            entries.extend(done?);
        }
        Ok(entries)
    })
}

/// The files of a folder that count, by name, with their lengths.
fn files(folder: &Path) -> LoadResult<Vec<(String, u64)>> {
    let unreadable = |error: std::io::Error| LoadError::io(folder, &error);
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let name = entry.map_err(unreadable)?.file_name();
        let Some(name) = counted(&name) else { continue };
        let path = folder.join(name);
        let metadata = std::fs::metadata(&path).map_err(|error| LoadError::io(&path, &error))?;
        if metadata.is_dir() {
            continue;
        }
        if !metadata.is_file() {
            return Err(LoadError::corrupt(format!("{} is not a regular file", path.display())));
        }
        if name.contains(['\n', '\\']) {
            let what = "its name has a line end or a backslash, which a manifest cannot hold: rename it";
            return Err(LoadError::corrupt(format!("{path:?}: {what}")));
        }
        if files.len() == FILE_LIMIT {
            return Err(LoadError::corrupt(format!("{} has more than {FILE_LIMIT} files", folder.display())));
        }
        files.push((name.to_owned(), metadata.len()));
    }
    if files.is_empty() {
        return Err(LoadError::not_found(format!(
            "{} has no file in *.{}: it is no model folder",
            folder.display(),
            ENDINGS.join(", *.")
        )));
    }
    files.sort();
    Ok(files)
}

/// The name, when it is that of a file that counts.
fn counted(name: &OsStr) -> Option<&str> {
    let name = name.to_str().filter(|name| !name.starts_with('.'))?;
    let (_, ending) = name.rsplit_once('.')?;
    ENDINGS.contains(&ending).then_some(name)
}

fn hash(path: &Path, drop_pages: bool, advance: &dyn Fn(usize)) -> LoadResult<[u8; 32]> {
    let unreadable = |error: std::io::Error| LoadError::io(path, &error);
    let mut file = File::open(path).map_err(unreadable)?;
    // advice: nothing depends on it being taken
    let _ = fadvise(&file, 0, None, Advice::Sequential);
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; PIECE];
    let mut offset = 0;
    loop {
        let read = match file.read(&mut buffer) {
            Ok(0) => return Ok(hasher.finalize().into()),
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(unreadable(error)),
        };
        hasher.update(&buffer[..read]);
        if drop_pages {
            let _ = fadvise(&file, offset, NonZeroU64::new(read as u64), Advice::DontNeed);
        }
        offset += read as u64;
        advance(read);
    }
}

#[cfg(test)]
mod tests;
