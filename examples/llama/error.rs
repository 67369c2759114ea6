//! Errors as one line for users, shared with the train example.

/// The error and its causes, each cut to its first line, because candle adds a backtrace after it. A cause that its
/// effect already quotes is left out.
pub fn one_line(error: &anyhow::Error) -> String {
    let mut parts: Vec<String> = Vec::new();
    for cause in error.chain() {
        let part = cause.to_string().lines().next().unwrap_or_default().trim().to_string();
        if !parts.last().is_some_and(|effect| effect.contains(&part)) {
            parts.push(part);
        }
    }
    parts.join(": ")
}
