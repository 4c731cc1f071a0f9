//! Damaged model folders: each is refused in a sentence, and none brings the process down. Ten thousand cases, or as many
//! for each 2000 of `ERNIE_CORRUPTIONS`.

mod adapter;
mod config;
mod header;
mod index;
mod tally;
mod text;
mod weights;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use ernie_proto::failure::Reason;
use ernie_worker::bench::memory::memory;
use ernie_worker::model::digest::{Manifest, ModelDigest, Reading};
use ernie_worker::model::{Checkpoint, LoadError, LoadOptions};
use tempfile::TempDir;

use self::tally::Tally;
use crate::reference::folder;

/// Cases of the commonest kind; `ERNIE_CORRUPTIONS` sets another number.
fn cases() -> u64 {
    std::env::var("ERNIE_CORRUPTIONS").ok().and_then(|text| text.parse().ok()).unwrap_or(2000)
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

/// A copy of a golden folder that may be damaged.
struct Copy {
    folder: TempDir,
    name: &'static str,
    digest: ModelDigest,
}

impl Copy {
    fn of(name: &'static str) -> Self {
        let copied = tempfile::tempdir().expect("a folder");
        for file in ["config.json", "generation_config.json", "model.safetensors"] {
            fs::copy(folder(name).join(file), copied.path().join(file)).expect("copied");
        }
        let digest = manifest(copied.path()).digest();
        Self { folder: copied, name, digest }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn original(&self, file: &str) -> Vec<u8> {
        fs::read(folder(self.name).join(file)).expect("a golden file")
    }

    fn restore(&self, file: &str) {
        self.write(file, &self.original(file));
    }

    fn write(&self, file: &str, bytes: &[u8]) {
        fs::write(self.path().join(file), bytes).expect("written");
    }

    fn inspect(&self) -> Result<Checkpoint, LoadError> {
        Checkpoint::inspect(self.path())
    }

    /// Fails unless the folder is refused in one sentence.
    fn refused(&self, what: &str) -> LoadError {
        let Err(error) = self.inspect() else { panic!("{} accepted: {what}", self.name) };
        let text = error.to_string();
        assert!(text.len() > 20 && text.len() < 1000 && !text.contains('\n'), "{what}: {text}");
        assert!(
            matches!(error.reason(), Reason::CorruptModel | Reason::UnsupportedModel | Reason::ModelNotFound),
            "{what}: {text}"
        );
        tally::refused();
        error
    }

    /// Fails unless the folder is refused, or is a sound one. As one that differs from `whole` it must be refused where the
    /// digest is given.
    fn refused_or_sound(&self, what: &str, whole: &Checkpoint) {
        match self.inspect() {
            Err(_) => drop(self.refused(what)),
            Ok(found) if found.config == whole.config && found.tensors.places == whole.tensors.places => tally::same(),
            Ok(_) => {
                let error = manifest(self.path()).check(self.digest).expect_err(what);
                assert_eq!(error.reason(), Reason::DigestMismatch, "{what}");
                tally::other();
            }
        }
    }
}

/// Splits a safetensors file into the text of its header and its data.
fn split(bytes: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let (length, rest) = bytes.split_first_chunk::<8>().expect("a length");
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    (header.to_vec(), data.to_vec())
}

/// Puts a safetensors file together.
fn join(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header, data].concat()
}

fn small() -> LoadOptions {
    LoadOptions { max_model_len: Some(64), max_num_seqs: 1, threads: 1, ..LoadOptions::default() }
}

fn manifest(path: &Path) -> Manifest {
    Manifest::of(path, &Reading { threads: 2, drop_pages: false, report: &|_| {} }).expect("readable")
}

#[test]
fn folders_that_are_no_model_are_refused_with_what_is_missing() {
    let copy = Copy::of("dense-tied");
    let missing: PathBuf = copy.path().join("nothing");
    for (path, expected) in [(missing.as_path(), "does not exist"), (&copy.path().join("config.json"), "not a folder")]
    {
        let error = Checkpoint::inspect(path).expect_err("refused");
        assert_eq!(error.reason(), Reason::ModelNotFound);
        assert!(error.to_string().contains(expected), "{error}");
    }
    fs::remove_file(copy.path().join("model.safetensors")).expect("removed");
    assert!(copy.refused("no weights").to_string().contains("neither model.safetensors nor"));
    copy.write("pytorch_model.bin", b"");
    assert!(copy.refused("another format").to_string().contains("convert it to safetensors"));
    fs::remove_file(copy.path().join("config.json")).expect("removed");
    assert!(copy.refused("no config").to_string().contains("no config.json"));
}

#[test]
#[ignore = "measures its process: run alone by the test below"]
fn every_kind_of_damage_in_a_process_of_its_own() {
    let copy = Copy::of("dense-tied");
    copy.inspect().expect("whole");
    let base = memory("self", "VmHWM").expect("a peak");
    for claim in [10u64 << 30, u64::MAX, 100 << 20, 1 << 62] {
        copy.write("model.safetensors", &[&claim.to_le_bytes()[..], b"{"].concat());
        copy.refused("a header longer than the file");
        // a hole in a file costs the disk nothing
        let file = fs::OpenOptions::new().write(true).open(copy.path().join("model.safetensors")).expect("opened");
        file.set_len(11 << 30).expect("grown");
        copy.refused("a header of 10 GiB");
    }
    config::configs_with_a_value_that_cannot_be_are_refused();
    config::configs_of_another_shape_are_refused_with_the_tensor_s_name();
    config::garbled_configs_are_refused_or_sound_and_cut_ones_are_refused();
    header::headers_with_a_changed_byte_are_refused_unless_they_say_the_same();
    header::headers_with_a_damaged_entry_are_refused();
    header::files_of_another_length_are_refused();
    index::damaged_indexes_are_refused();
    adapter::adapter_headers_that_are_damaged_are_refused_unless_they_say_the_same();
    adapter::adapter_files_of_another_length_are_refused();
    adapter::adapter_configs_that_are_damaged_are_refused();
    text::tokenizers_with_a_damaged_entry_are_refused();
    text::sentencepiece_models_that_are_cut_are_refused_and_garbled_ones_never_panic();
    text::garbled_chat_templates_are_refused_or_show_what_the_user_says();
    let grown = memory("self", "VmHWM").expect("a peak") - base;
    println!("{Tally}; at most {} KiB more memory than the sound one ({} MiB)", grown >> 10, base >> 20);
    assert!(grown <= 64 << 20, "{grown} bytes more than a sound folder takes");
}

#[test]
fn no_damaged_model_brings_a_process_down_or_takes_much_of_its_memory() {
    let name = "corruption::every_kind_of_damage_in_a_process_of_its_own";
    let mut command = std::process::Command::new(std::env::current_exe().expect("this test"));
    let output = command.args(["--exact", name, "--ignored", "--nocapture"]).output().expect("started");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let told = said.lines().find(|line| line.contains(" damaged: ")).expect("counts");
    // straight to the terminal: what a passing test prints is not shown
    let _ = writeln!(std::io::stderr(), "models: {told}");
}
