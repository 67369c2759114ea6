//! candle-transformers' models, compiled from that crate's own files with its feature `flash-attn`, where
//! `candle_flash_attn` is the stand-in of `compat/candle-flash-attn`.

// The models' name for it.
extern crate candle_core as candle;

/// The models.
#[allow(warnings, clippy::all)]
pub mod models {
    include!(concat!(env!("OUT_DIR"), "/models.rs"));
}

#[allow(warnings, clippy::all)]
mod shared {
    include!(concat!(env!("OUT_DIR"), "/shared.rs"));
}
#[allow(unused_imports)]
pub(crate) use shared::{quantized_var_builder, utils};
