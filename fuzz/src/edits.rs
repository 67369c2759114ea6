//! Inputs as edits of a valid file. Readers reject random bytes at once; they often accept an edited file, and no
//! corpus has to be kept.

use arbitrary::{Result, Unstructured};

/// Numbers at the edges of the integer types and around powers of two, and other JSON values in place of a number.
const NUMBERS: [&str; 16] = [
    "0",
    "1",
    "2",
    "-1",
    "65537",
    "2147483648",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
    "1e308",
    "1e-320",
    "0.5",
    "null",
    "[]",
];
const WORDS: [u64; 8] = [0, 1, 0x7f, 0xff, 0x7fff_ffff, 0xffff_ffff, 1 << 40, u64::MAX];

/// Applies edits to the file until the input ends.
pub fn edit(file: &mut Vec<u8>, input: &mut Unstructured) -> Result<()> {
    while !input.is_empty() && !file.is_empty() {
        let at = usize::from(input.arbitrary::<u16>()?) % file.len();
        match input.int_in_range(0..=6u8)? {
            0 => file[at] = input.arbitrary()?,
            1 => file[at] ^= 1 << input.int_in_range(0..=7u8)?,
            2 => file.insert(at, input.arbitrary()?),
            3 => {
                let end = file.len().min(at + usize::from(input.arbitrary::<u8>()?));
                file.drain(at..end);
            }
            4 => overwrite(file, at, input)?,
            5 => another_number(file, at, input)?,
            _ => {
                let end = file.len().min(at + usize::from(input.arbitrary::<u8>()?));
                let to = usize::from(input.arbitrary::<u16>()?) % file.len();
                let copy = file[at..end].to_vec();
                file.splice(to..to, copy);
            }
        }
    }
    Ok(())
}

/// A little-endian number of 1 to 8 bytes.
fn overwrite(file: &mut [u8], at: usize, input: &mut Unstructured) -> Result<()> {
    let word = input.choose(&WORDS)?.to_le_bytes();
    let size = 1 << input.int_in_range(0..=3u8)?;
    let end = file.len().min(at + size);
    file[at..end].copy_from_slice(&word[..end - at]);
    Ok(())
}

/// The next run of digits becomes another number.
fn another_number(file: &mut Vec<u8>, at: usize, input: &mut Unstructured) -> Result<()> {
    let number = input.choose(&NUMBERS)?;
    let digit = |byte: &u8| byte.is_ascii_digit() || *byte == b'.';
    if let Some(start) = file[at..].iter().position(digit) {
        let start = at + start;
        let count = file[start..].iter().take_while(|byte| digit(byte)).count();
        file.splice(start..start + count, number.bytes());
    }
    Ok(())
}
