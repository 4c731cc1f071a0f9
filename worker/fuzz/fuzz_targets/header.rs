//! The header of a safetensors file. The first two bytes say how much longer than the header the file is.
#![no_main]

use ernie_worker::model::safetensors::parse;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((data, text)) = bytes.split_first_chunk::<2>() else { return };
    let start = 8 + text.len() as u64;
    let length = start + u64::from(u16::from_le_bytes(*data));
    if let Ok(tensors) = parse(text, start, length) {
        let mut end = start;
        for tensor in tensors {
            assert_eq!(tensor.offset, end, "{tensor:?}");
            end += tensor.bytes;
        }
        assert_eq!(end, length);
    }
});
