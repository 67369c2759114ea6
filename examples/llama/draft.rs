//! Drafts of the next tokens, without another model: a text that repeats itself goes on as it did before.

/// The most of the last tokens that are looked up.
const LONGEST: usize = 4;

/// The fewest. What followed a single token is refused too often.
const SHORTEST: usize = 2;

/// The `count` tokens that followed the last tokens of `text` where these stood before. More of the last tokens are
/// looked up before fewer, and the latest place counts. Where the text ends before the draft does, the draft goes on
/// from its own beginning, as a text does that repeats itself. Empty where no place is found.
pub fn look_up(text: &[u32], count: usize) -> Vec<u32> {
    let lengths = (SHORTEST..=LONGEST).rev().filter(|length| *length < text.len());
    let place = |length: usize| {
        let last = &text[text.len() - length..];
        let starts = text[..text.len() - 1]
            .windows(length)
            .rposition(|tokens| tokens == last);
        starts.map(|start| start + length)
    };
    let Some(first) = lengths.into_iter().find_map(place) else {
        return Vec::new();
    };
    let period = &text[first..];
    period.iter().copied().cycle().take(count).collect()
}

/// The [`CacheOptions::rollback`](candle_sfattention::CacheOptions::rollback) for drafts of `count` tokens: a cache
/// takes in the draft and the token before it as one call, and takes back the draft.
pub fn rollback(count: usize) -> usize {
    count.saturating_add(1)
}
