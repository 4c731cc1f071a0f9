//! A file's bytes as a slice: in place where that is safe, otherwise in memory of our own.
//!
//! A mapped file that somebody shortens kills the process that touches the missing pages (SIGBUS), and mapped pages are
//! evicted and read again under a tight memory limit. So a file is used in place only when its *filesystem* is
//! read-only, as that of an image volume is; a read-only mount of a writable volume is not enough, because others may
//! write to it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use memmap2::{Advice, Mmap, MmapOptions};

use crate::memory::Pages;

/// Bytes read at a time.
const PIECE: usize = 4 << 20;

/// The bytes of a file, unchanging whatever happens to the file.
pub struct Mapping {
    bytes: Bytes,
}

enum Bytes {
    InPlace(Mmap),
    Read(Pages),
}

impl Mapping {
    /// Opens a file: maps it when its filesystem is read-only, else reads it into anonymous memory on huge pages and,
    /// if `drop_pages`, drops the file's own pages from the page cache behind the reader.
    ///
    /// # Errors
    /// When the file cannot be read, ends before the length it had when it was opened, or does not fit into memory; the
    /// message names the file.
    pub fn open(path: &Path, drop_pages: bool) -> io::Result<Mapping> {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let file = File::open(path).map_err(named)?;
        let len = usize::try_from(file.metadata().map_err(named)?.len()).unwrap_or(usize::MAX);
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        if len > 0 && fs::canonicalize(path).is_ok_and(|path| is_on_read_only_filesystem(&mounts, &path)) {
            return Self::in_place_of(&file, len).map_err(named);
        }
        let mut pages = Pages::zeroed(len).map_err(named)?;
        read(&file, pages.as_mut_slice(), drop_pages).map_err(named)?;
        Ok(Mapping { bytes: Bytes::Read(pages) })
    }

    fn in_place_of(file: &File, len: usize) -> io::Result<Mapping> {
        // SAFETY: the caller has found the file on a filesystem that is read-only for everybody, so its bytes neither
        // change nor vanish while they are mapped.
        let map = unsafe { MmapOptions::new().len(len).map(file)? };
        // Advice only.
        let _ = map.advise(Advice::WillNeed);
        Ok(Mapping { bytes: Bytes::InPlace(map) })
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        match &self.bytes {
            Bytes::InPlace(map) => map,
            Bytes::Read(pages) => pages.as_slice(),
        }
    }

    /// Whether the bytes are the file's own pages, which count as cache, not as memory of this process.
    pub fn is_in_place(&self) -> bool {
        matches!(self.bytes, Bytes::InPlace(_))
    }
}

impl std::fmt::Debug for Mapping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mapping of {} bytes, in place: {}", self.as_slice().len(), self.is_in_place())
    }
}

/// Fills `to` from the start of the file.
fn read(file: &File, to: &mut [u8], drop_pages: bool) -> io::Result<()> {
    let len = to.len();
    let mut done = 0;
    for piece in to.chunks_mut(PIECE) {
        file.read_exact_at(piece, done as u64).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                io::Error::new(error.kind(), format!("ends before its {len} bytes: it was cut short while it was read"))
            }
            _ => error,
        })?;
        if drop_pages {
            drop_behind(file, done, piece.len());
        }
        done += piece.len();
    }
    Ok(())
}

#[cfg(target_os = "linux")]
fn drop_behind(file: &File, offset: usize, len: usize) {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor is open; the call reads and writes no memory of ours. It is advice: its result is of no use.
    unsafe {
        libc::posix_fadvise(file.as_raw_fd(), offset as libc::off_t, len as libc::off_t, libc::POSIX_FADV_DONTNEED)
    };
}

#[cfg(not(target_os = "linux"))]
fn drop_behind(_: &File, _: usize, _: usize) {}

/// Whether the filesystem that holds `path` (absolute, without links) is read-only, by the lines of
/// `/proc/self/mountinfo`.
fn is_on_read_only_filesystem(mountinfo: &str, path: &Path) -> bool {
    // ID PARENT MAJOR:MINOR ROOT MOUNTPOINT OPTIONS [FIELD…] - TYPE SOURCE SUPER-OPTIONS
    let mount = |line: &str| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let point = unescape(mount.split(' ').nth(4)?);
        let read_only = filesystem.split(' ').nth(2)?.split(',').any(|option| option == "ro");
        path.starts_with(&point).then(|| (point.components().count(), read_only))
    };
    // Of several mounts on one point the last one is visible.
    let innermost = mountinfo.lines().filter_map(mount).max_by_key(|(depth, _)| *depth);
    innermost.is_some_and(|(_, read_only)| read_only)
}

/// Replaces the octal escapes that the kernel writes for blanks and backslashes.
fn unescape(field: &str) -> PathBuf {
    let mut text = field.to_owned();
    for (escape, character) in [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")] {
        text = text.replace(escape, character);
    }
    text.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str, bytes: &[u8]) -> Scratch {
            let path = std::env::temp_dir().join(format!("ernie-kernels-{name}-{}", std::process::id()));
            fs::write(&path, bytes).expect("a file");
            Scratch(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_file(&self.0);
        }
    }

    #[test]
    fn a_file_that_is_cut_short_after_opening_keeps_its_bytes() {
        let bytes: Vec<u8> = (0..PIECE + 4096 + 7).map(|i| (i % 251) as u8).collect();
        for drop_pages in [false, true] {
            let file = Scratch::new("cut", &bytes);
            let mapping = Mapping::open(&file.0, drop_pages).expect("readable");
            assert!(!mapping.is_in_place(), "the folder for temporary files is writable");
            File::options().write(true).open(&file.0).and_then(|file| file.set_len(10)).expect("shortened");
            assert!(mapping.as_slice() == bytes);
        }
    }

    #[test]
    fn a_file_that_is_cut_short_while_it_is_read_is_an_error_that_says_so() {
        let file = Scratch::new("shrinking", &[1; 100]);
        let error = read(&File::open(&file.0).expect("open"), &mut [0; 200], false).expect_err("too short");
        assert!(error.to_string().contains("ends before its 200 bytes"), "{error}");
    }

    #[test]
    fn a_missing_file_is_an_error_that_names_it() {
        let error = Mapping::open(Path::new("/nonexistent/model.bin"), false).expect_err("missing");
        assert!(error.to_string().contains("/nonexistent/model.bin"), "{error}");
    }

    #[test]
    fn an_empty_file_is_an_empty_slice() {
        let file = Scratch::new("empty", &[]);
        assert!(Mapping::open(&file.0, false).expect("readable").as_slice().is_empty());
    }

    #[test]
    fn a_file_in_place_has_the_files_bytes() {
        let file = Scratch::new("mapped", b"weights");
        let mapping = Mapping::in_place_of(&File::open(&file.0).expect("open"), 7).expect("mapped");
        assert!(mapping.is_in_place());
        assert_eq!(mapping.as_slice(), b"weights");
    }

    #[test]
    fn only_a_read_only_filesystem_counts_not_a_read_only_mount() {
        let mounts = "\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
40 27 0:50 / /models ro,relatime shared:9 master:2 - overlay overlay ro,lowerdir=/a
41 27 254:0 /volumes/x /data ro,relatime - ext4 /dev/vda rw,discard
42 40 0:51 / /models/with\\040blank rw,relatime - tmpfs tmpfs rw,size=4k
43 27 0:52 / /twice rw - tmpfs tmpfs rw
44 43 0:53 / /twice ro - squashfs /dev/loop0 ro
a line that is no mount";
        let read_only = |path: &str| is_on_read_only_filesystem(mounts, Path::new(path));
        assert!(read_only("/models/ernie/model.bin"));
        assert!(!read_only("/data/model.bin"), "others may write to the volume");
        assert!(!read_only("/models/with blank/model.bin"));
        assert!(!read_only("/modelsx/model.bin"));
        assert!(read_only("/twice/model.bin"), "the last mount on a point is the visible one");
        assert!(!is_on_read_only_filesystem("", Path::new("/x")));
    }
}
