//! A report's numbers for people, as Markdown.

use super::summary::{Asked, Row, Summary};

pub fn markdown(summary: &Summary) -> String {
    let parts = [windows(summary), tasks(summary), apart(summary)];
    format!("# {}\n\n", summary.model) + &parts.concat()
}

/// A number, or a dash where there is none.
fn cell(number: Option<f64>, digits: usize) -> String {
    number.map_or("-".into(), |number| format!("{number:.digits$}"))
}

/// What windows of text cost, and what is kept at their end. Speed stands before the last column, which repeats itself
/// from run to run.
fn windows(summary: &Summary) -> String {
    let mut out =
        "| method | windows | perplexity | nll over dense | KL from dense | same top token | copy test | copy \
                   over dense | copy KL | hidden | KV of dense | tokens/s | pass key |\n\
                   |---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
            .to_string();
    for row in &summary.rows {
        out += &window_row(row);
    }
    out + "\nNats a predicted token; KL is KL(dense || method). An error is the standard error over the windows, of \
           paired differences where it is a difference. Hidden: entries left out at the end of a window, of all.\n"
}

fn window_row(row: &Row) -> String {
    let passkey = row.passkey.iter().map(|at| {
        format!(
            "{}: {}/{} ({:.2} nats a key, {:.3} hidden)",
            at.length, at.found, at.tries, at.nll, at.hidden_ratio
        )
    });
    let passkey: Vec<String> = passkey.collect();
    let (prose, copied) = (row.prose.as_ref(), row.copied.as_ref());
    let dash = || "-".to_string();
    let cells = [
        row.method.clone(),
        prose.map_or(dash(), |prose| prose.nats.samples.to_string()),
        cell(row.perplexity, 2),
        prose.map_or(dash(), |prose| format!("{:+.4}", prose.nats_over_dense)),
        prose.map_or(dash(), |prose| format!("{:.4}", prose.divergence)),
        prose.map_or(dash(), |prose| format!("{:.3}", prose.agreement)),
        cell(row.copy, 3),
        copied.map_or(dash(), |copied| format!("{:+.4}", copied.nats_over_dense)),
        copied.map_or(dash(), |copied| format!("{:.4}", copied.divergence)),
        cell(row.hidden_ratio, 3),
        cell(row.kv_bytes_of_dense, 3),
        cell(row.tokens_per_second, 0),
        if passkey.is_empty() { dash() } else { passkey.join(", ") },
    ];
    format!("| {} |\n", cells.join(" | "))
}

/// What questions cost: a row for each kind, length and method.
fn tasks(summary: &Summary) -> String {
    let mut kinds: Vec<(&str, usize)> = Vec::new();
    for asked in summary.rows.iter().flat_map(|row| &row.tasks) {
        if !kinds.contains(&(&asked.task, asked.length)) {
            kinds.push((&asked.task, asked.length));
        }
    }
    if kinds.is_empty() {
        return String::new();
    }
    let mut out = "\nQuestions after a text: nats of a whole answer, KL and agreement a token of it. Right: the share \
                   of answers whose tokens are all the likeliest ones. Errors as above, over the samples.\n\n\
                   | task | method | samples | nats | over dense | right | right over dense | KL from dense | same top \
                   token | hidden |\n|---|---|---|---|---|---|---|---|---|---|\n"
        .to_string();
    for (task, length) in kinds {
        for row in &summary.rows {
            let of_kind = |asked: &&Asked| asked.task == task && asked.length == length;
            if let Some(asked) = row.tasks.iter().find(of_kind) {
                out += &format!(
                    "| {task} {length} | {} | {} | {:.3} | {:+.3} | {:.2} | {:+.2} | {:.4} | {:.3} | {:.3} |\n",
                    row.method,
                    asked.found.samples,
                    asked.compared.nats,
                    asked.compared.nats_over_dense,
                    asked.found,
                    asked.found_over_dense,
                    asked.compared.divergence,
                    asked.compared.agreement,
                    asked.hidden_ratio,
                );
            }
        }
    }
    out
}

/// A table of what layers that slide keep, and what the others keep; empty without layers that slide.
fn apart(summary: &Summary) -> String {
    let rows = summary.rows.iter();
    let rows = rows.filter_map(|row| Some((&row.method, row.apart.as_ref()?)));
    let rows: Vec<String> = rows
        .map(|(method, parts)| {
            let cells = [&parts.whole, &parts.sliding].map(|part| {
                format!(
                    "{:.0} | {:.3} | {:.3} | {:.0}",
                    part.kv_bytes / 1024.0,
                    part.kv_bytes_of_dense,
                    part.hidden_ratio,
                    part.entries_a_list
                )
            });
            format!("| {method} | {} |\n", cells.join(" | "))
        })
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    let header = "\nLayers that see all tokens, then layers that slide, at the end of a window. A layer that slides \
                  keeps what its next row sees, in the dense cache too.\n\n| method | all: KiB | of dense | hidden | \
                  entries a list | slide: KiB | of dense | hidden | entries a list |\n\
                  |---|---|---|---|---|---|---|---|---|\n";
    header.to_string() + &rows.concat()
}
