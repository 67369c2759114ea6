//! Lists on the host, for a saved cache.

use crate::config::{ByteCode, HeadTest};
use half::bf16;

/// The keys and values of closed chains.
#[derive(Clone, Debug)]
pub(crate) enum ClosedRows<T> {
    InDtype {
        keys: Vec<T>,
        values: Vec<T>,
    },
    /// Codes in 8 bits and a scale for each row, of keys and of values.
    Coded {
        codes: [Vec<u8>; 2],
        scales: [Vec<bf16>; 2],
    },
}

impl<T> Default for ClosedRows<T> {
    fn default() -> Self {
        Self::InDtype {
            keys: Vec::new(),
            values: Vec::new(),
        }
    }
}

impl<T> ClosedRows<T> {
    /// Keys and values in the storage dtype; none where they are in 8 bits.
    pub fn in_dtype(&self) -> [&[T]; 2] {
        match self {
            Self::InDtype { keys, values } => [keys, values],
            Self::Coded { .. } => [&[]; 2],
        }
    }

    /// Codes of keys and of values; none where they are in the storage dtype.
    pub fn codes(&self) -> [&[u8]; 2] {
        match self {
            Self::InDtype { .. } => [&[]; 2],
            Self::Coded { codes, .. } => [&codes[0], &codes[1]],
        }
    }

    /// The scales of each key and value as a word: `CodedRows` in cuda/cache/codes.cuh.
    pub fn scales(&self) -> Vec<u32> {
        let word = |(key, value): (&bf16, &bf16)| u32::from(key.to_bits()) | u32::from(value.to_bits()) << 16;
        match self {
            Self::InDtype { .. } => Vec::new(),
            Self::Coded {
                scales: [keys, values], ..
            } => keys.iter().zip(values).map(word).collect(),
        }
    }
}

/// One list; a key has D numbers, and a value Dv.
#[derive(Clone, Debug, Default)]
pub(crate) struct HostList<T> {
    /// Closed chains, and the last token of each; the first token of these chains, 0 until one left the sliding window.
    pub kept_from: usize,
    pub far: ClosedRows<T>,
    pub tokens: Vec<u32>,
    /// The open chain's key and value, and its last raw key and value, which only a pair sum reads; None while the
    /// window is not full.
    pub chain: Option<[Vec<f32>; 4]>,
    /// The number of tokens of the open chain; always 1 but for [`Fold::Mean`](crate::Fold::Mean).
    pub chain_size: u32,
    /// The last min(window, tokens seen) tokens, raw. A token that is not finite keeps only the parts that decisions
    /// and attention can tell apart.
    pub recent_k: Vec<T>,
    pub recent_v: Vec<T>,
    /// Whether a token joins its left neighbour, from the open chain's (or the first) token to the last but one.
    pub bits: Vec<u8>,
    /// The first token of the run that ends at the last token, and its key.
    pub run: Option<(usize, Vec<T>)>,
    pub last_key: Vec<T>,
    /// Whether the last token is hidden once it has left the window, by a given score.
    pub last_hidden: bool,
    /// Under observed mass: the mass of each recent token, and the keys of the first tokens.
    pub masses: Vec<f32>,
    pub sink_keys: Vec<T>,
}

/// All lists of a cache, batch row by batch row.
pub(crate) struct HostLists<T> {
    pub seq_len: usize,
    /// The sliding window of the calls that attended; None before the first of them.
    pub sliding_window: Option<Option<usize>>,
    /// The code of closed chains in 8 bits.
    pub code: Option<ByteCode>,
    pub lists: Vec<HostList<T>>,
    /// The last token's queries (batch, H, D), if the fold is a pair sum.
    pub last_queries: Option<Vec<T>>,
    /// The tests of every query head of every batch row.
    pub tests: Vec<HeadTest>,
}
