use super::*;

/// The text of a header, and where its file ends.
fn header(entries: &str) -> Result<Vec<Tensor>, String> {
    parse(entries.as_bytes(), 100, 100 + 64)
}

const GOOD: &str = r#"{"__metadata__": {"format": "pt"},
    "b": {"dtype": "BF16", "shape": [2, 8], "data_offsets": [32, 64]},
    "a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}"#;

#[test]
fn tensors_are_given_in_the_order_of_their_bytes() {
    let tensors = header(GOOD).expect("a good header");
    assert_eq!(tensors[0].name, "a");
    assert_eq!((tensors[0].offset, tensors[0].bytes, tensors[0].stored), (100, 32, Stored::F32));
    assert_eq!((tensors[1].offset, &tensors[1].shape[..]), (132, &[2, 8][..]));
}

#[test]
fn headers_that_contradict_themselves_are_refused_with_the_tensor_s_name() {
    let cases = [
        ("overlap", GOOD.replace("[32, 64]", "[16, 48]"), "\"b\" overlaps"),
        ("gap", GOOD.replace("[2, 8]", "[2, 4]").replace("[32, 64]", "[48, 64]"), "\"b\" leaves a gap"),
        ("past the end", GOOD.replace("[2, 8]", "[2, 16]").replace("[32, 64]", "[32, 96]"), "cut short"),
        ("rest", GOOD.replace("[2, 8]", "[2, 4]").replace("[32, 64]", "[32, 48]"), "belongs to none"),
        ("backwards", GOOD.replace("[32, 64]", "[64, 32]"), "cannot lie"),
        ("shape", GOOD.replace("[2, 8]", "[2, 9]"), "cannot lie"),
        ("product", GOOD.replace("[2, 8]", "[4294967296, 4294967296, 16]"), "cannot lie"),
        ("offset", GOOD.replace("[32, 64]", "[18446744073709551575, 18446744073709551607]"), "cannot lie"),
        ("twice", GOOD.replace("\"b\"", "\"a\""), "\"a\" twice"),
        ("dtype", GOOD.replace("BF16", "BF17"), "unknown dtype"),
        ("rank", GOOD.replace("[2, 8]", "[2, 8, 1, 1, 1, 1, 1, 1, 1]"), "not valid"),
        ("negative", GOOD.replace("[2, 8]", "[2, -8]"), "not valid"),
        ("field", GOOD.replace("\"shape\": [8],", "\"shape\": [8], \"more\": 1,"), "not valid"),
        ("missing", GOOD.replace("\"shape\": [8],", ""), "not valid"),
        ("metadata", GOOD.replace("\"pt\"", "1"), "not valid"),
        ("nesting", format!("{{\"a\": {}", "[".repeat(10_000)), "not valid"),
        ("cut", GOOD[..60].to_owned(), "not valid"),
        ("no object", "[]".to_owned(), "begin with '{'"),
    ];
    for (name, text, expected) in cases {
        let error = header(&text).expect_err(name);
        assert!(error.contains(expected), "{name}: {error}");
    }
    assert!(parse(&[b'{', 0xff, b'}'], 100, 164).expect_err("no text").contains("UTF-8"));
}

#[test]
fn a_scalar_and_an_empty_tensor_are_no_contradiction() {
    let text = r#"{"s": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "e": {"dtype": "F32", "shape": [0, 7], "data_offsets": [4, 4]}}"#;
    assert_eq!(parse(text.as_bytes(), 10, 14).expect("good").len(), 2);
}

fn file(bytes: &[u8]) -> Result<Header, LoadError> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.safetensors");
    std::fs::write(&path, bytes).expect("written");
    Header::read(&path)
}

#[test]
fn a_claim_of_ten_gigabytes_of_header_is_refused_before_anything_is_allocated() {
    for claim in [10u64 << 30, u64::MAX, 57] {
        let mut bytes = claim.to_le_bytes().to_vec();
        bytes.extend([b'{'; 56]);
        let error = file(&bytes).expect_err("refused").to_string();
        assert!(error.contains("claims a header of") && error.contains("model.safetensors"), "{error}");
    }
    assert!(file(b"short").expect_err("refused").to_string().contains("5 bytes"));
}

#[test]
fn a_folder_in_place_of_a_file_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    assert!(Header::read(folder.path()).expect_err("refused").to_string().contains("not a regular file"));
}

#[test]
fn weight_formats_are_widened_from_any_place() {
    let numbers = |dtype, bytes: &[u8]| widen(dtype, bytes).collect::<Vec<f32>>();
    assert_eq!(numbers(Dtype::Float32, &1.5f32.to_le_bytes()), [1.5]);
    assert_eq!(numbers(Dtype::Bfloat16, &[0x80, 0x3f, 0x00, 0xc0]), [1.0, -2.0]);
    assert_eq!(numbers(Dtype::Float16, &[0x00, 0x3c, 0x00, 0xc0]), [1.0, -2.0]);
}
