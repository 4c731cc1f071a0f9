use std::fs;
use std::sync::Mutex;

use super::*;

fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).expect("written");
    }
    folder
}

fn manifest(folder: &Path) -> LoadResult<Manifest> {
    Manifest::of(folder, &Reading { threads: 3, drop_pages: false, report: &|_| {} })
}

const FILES: [(&str, &[u8]); 4] = [
    ("config.json", b"{}"),
    ("Zebra.model", b"abc"),
    ("model-00002-of-00002.safetensors", b""),
    ("chat_template.jinja", "{{ 你好 }}".as_bytes()),
];

#[test]
fn a_digest_is_read_as_it_is_written_and_nothing_else_is() {
    let text = format!("sha256:{}", "0123456789abcdef".repeat(4));
    assert_eq!(text.parse::<ModelDigest>().expect("a digest").to_string(), text);
    for wrong in [
        "",
        "sha256:",
        &text[7..],
        &text[..70],
        &format!("{text}0"),
        &text.to_uppercase(),
        &text.replace('f', "F"),
        &text.replace('f', "g"),
        &text.replace("sha256", "sha512"),
        &text.replace("ef", "é"),
    ] {
        assert!(wrong.parse::<ModelDigest>().expect_err(wrong).contains("64 hexadecimal digits"));
    }
}

#[test]
fn the_manifest_is_what_sha256sum_prints() {
    let folder = folder(&FILES);
    let line = r"LC_ALL=C ls | grep -E '\.(jinja|json|model|safetensors)$' | xargs -d '\n' sha256sum";
    let shell = |line: &str| {
        let output = std::process::Command::new("sh").args(["-c", line]).current_dir(folder.path()).output();
        String::from_utf8(output.expect("a shell").stdout).expect("text")
    };
    let manifest = manifest(folder.path()).expect("a manifest");
    assert_eq!(manifest.to_string(), shell(line));
    assert_eq!(manifest.digest().to_string(), format!("sha256:{}", &shell(&format!("{line} | sha256sum"))[..64]));
}

#[test]
fn files_that_a_worker_does_not_read_do_not_count_and_links_do() {
    let folder = folder(&FILES);
    let before = manifest(folder.path()).expect("a manifest").digest();
    for name in ["README.md", ".hidden.json", "json", "pytorch_model.bin"] {
        fs::write(folder.path().join(name), b"x").expect("written");
    }
    fs::create_dir(folder.path().join("old.model")).expect("made");
    assert_eq!(manifest(folder.path()).expect("a manifest").digest(), before);
    fs::rename(folder.path().join("config.json"), folder.path().join("blob")).expect("moved");
    std::os::unix::fs::symlink("blob", folder.path().join("config.json")).expect("linked");
    assert_eq!(manifest(folder.path()).expect("a manifest").digest(), before);
    fs::write(folder.path().join("added_tokens.json"), b"{}").expect("written");
    assert_ne!(manifest(folder.path()).expect("a manifest").digest(), before);
}

#[test]
fn a_mismatch_names_both_digests_the_remedy_and_every_file() {
    let folder = folder(&FILES);
    let manifest = manifest(folder.path()).expect("a manifest");
    manifest.check(manifest.digest()).expect("the same");
    let other: ModelDigest = format!("sha256:{}", "0".repeat(64)).parse().expect("a digest");
    let error = manifest.check(other).expect_err("another");
    assert_eq!(error.reason(), Reason::DigestMismatch);
    let text = error.to_string();
    for word in [&other.to_string(), &manifest.digest().to_string(), "--model-digest", "copy the model again"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    assert_eq!(
        error.detail()["files"]["Zebra.model"],
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    );
    assert!(error.termination().to_json().contains("Zebra.model"), "the detail fits a termination message");
}

#[test]
fn what_is_no_model_folder_has_no_digest() {
    let empty = folder(&[("README.md", b"x")]);
    let error = manifest(empty.path()).expect_err("no files");
    assert!(error.reason() == Reason::ModelNotFound && error.to_string().contains("*.safetensors"), "{error}");
    assert_eq!(manifest(&empty.path().join("none")).expect_err("absent").reason(), Reason::ModelNotFound);
    let odd = folder(&[("a\nb.json", b"x")]);
    assert!(manifest(odd.path()).expect_err("odd").to_string().contains("rename it"));
    let broken = folder(&FILES);
    std::os::unix::fs::symlink("nowhere", broken.path().join("tokenizer.json")).expect("linked");
    assert!(manifest(broken.path()).expect_err("broken").to_string().contains("tokenizer.json"));
    let pipe = folder(&FILES);
    let path = pipe.path().join("tokenizer.json");
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).expect("made");
    assert!(manifest(pipe.path()).expect_err("a pipe").to_string().contains("not a regular file"));
}

#[test]
fn progress_ends_at_the_bytes_of_all_files() {
    let large = vec![7; 3 * PIECE + 5];
    let folder = folder(&[("a.safetensors", &large), ("b.safetensors", &large), ("config.json", b"{}")]);
    let told = Mutex::new(Vec::new());
    let report = |progress: Progress| told.lock().expect("held by none").push((progress.loaded, progress.total));
    Manifest::of(folder.path(), &Reading { threads: 2, drop_pages: true, report: &report }).expect("a manifest");
    let told = told.into_inner().expect("held by none");
    let total = 2 * large.len() as u64 + 2;
    assert!(told.iter().all(|&(loaded, all)| loaded <= total && all == total), "{told:?}");
    assert!(told.len() >= 9 && told.iter().any(|&(loaded, _)| loaded == total), "{told:?}");
}
