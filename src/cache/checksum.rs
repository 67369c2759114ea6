//! The format of a saved cache, and its checksum.

use crc32fast::Hasher;
use safetensors::View;

/// The format that the metadata name.
pub(super) const FORMAT: &str = "candle-sfattention kv-cache";
/// Raised whenever the meaning of the header or of a tensor changes.
pub(super) const VERSION: &str = "1";

/// CRC-32, as in zip, in eight hexadecimal digits. It covers the format, the version, the header, and each tensor's
/// name, dtype, shape and bytes, in the order of the names. Each text comes after its length, and each shape after its
/// rank, as u64. Sorts the tensors.
pub(super) fn checksum<V: View>(header: &str, tensors: &mut [(String, V)]) -> String {
    let mut crc = Hasher::new();
    for part in [FORMAT, VERSION, header] {
        text(&mut crc, part);
    }
    tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
    for (name, tensor) in tensors.iter() {
        text(&mut crc, name);
        text(&mut crc, &tensor.dtype().to_string());
        number(&mut crc, tensor.shape().len());
        tensor.shape().iter().for_each(|size| number(&mut crc, *size));
        crc.update(&tensor.data());
    }
    format!("{:08x}", crc.finalize())
}

fn text(crc: &mut Hasher, text: &str) {
    number(crc, text.len());
    crc.update(text.as_bytes());
}

fn number(crc: &mut Hasher, number: usize) {
    crc.update(&(number as u64).to_le_bytes());
}
