//! The tasks of a report, by their names, and as a file for other programs.

use anyhow::Result;
use serde::Serialize;

use super::passkey::passkey;
use super::run::Task;
use super::tasks::TaskMaker;
use crate::args::ReportArgs;
use crate::corpus::Window;
use crate::load::Checkpoint;
use crate::windows::{self, Purpose};

/// All tasks, and each kind of question with its length.
#[derive(Default)]
pub struct Workload {
    pub tasks: Vec<(String, Task)>,
    pub asked: Vec<(String, usize)>,
}

impl Workload {
    /// Every text window, each also as a copy test; pass keys at every length and depth; and the tasks that are made
    /// from seeds.
    pub fn new(tokens: &[u32], checkpoint: &Checkpoint, args: &ReportArgs) -> Result<Self> {
        let mut work = Self::default();
        let start = &checkpoint.start()?;
        for (index, window) in windows::spread(tokens, args.context, args.windows, Purpose::Score)?
            .into_iter()
            .enumerate()
        {
            work.add(format!("prose {index}"), Task::Text(Window::prose(window, start)));
            work.add(format!("copy {index}"), Task::Text(Window::copy(window, start)));
        }
        for length in &args.passkey {
            work.ask("passkey", *length);
            for (index, depth) in args.depths.iter().enumerate() {
                for key in 0..args.keys {
                    let number = index + key * args.depths.len();
                    let sample = passkey(checkpoint, (tokens, start), *length, *depth, number)?;
                    let again = if key == 0 { String::new() } else { format!(" {key}") };
                    work.add(format!("passkey {length} {depth}{again}"), Task::Asked(sample));
                }
            }
        }
        let encode = |text: &str| checkpoint.encode(text, false);
        for kind in &args.tasks {
            for length in &args.lengths {
                work.ask(kind.name(), *length);
                let maker = TaskMaker {
                    encode: &encode,
                    start,
                    prose: tokens,
                    length: *length,
                    seed: args.seed,
                };
                for index in 0..args.samples {
                    let name = format!("{} {length} {index}", kind.name());
                    work.add(name, Task::Asked(maker.sample(*kind, index)?));
                }
            }
        }
        Ok(work)
    }

    fn add(&mut self, name: String, task: Task) {
        self.tasks.push((name, task));
    }

    fn ask(&mut self, task: &str, length: usize) {
        let kind = (task.to_string(), length);
        if !self.asked.contains(&kind) {
            self.asked.push(kind);
        }
    }

    /// The questions as JSON.
    pub fn to_json(&self, model: &str) -> Result<String> {
        let questions = self.tasks.iter().filter_map(|(name, task)| match task {
            Task::Text(_) => None,
            Task::Asked(sample) => Some(Question {
                name,
                tokens: &sample.tokens,
                context: sample.context,
                answer: sample.answer,
            }),
        });
        let file = Questions {
            model,
            questions: questions.collect(),
        };
        Ok(serde_json::to_string(&file)? + "\n")
    }
}

#[derive(Serialize)]
struct Questions<'a> {
    model: &'a str,
    questions: Vec<Question<'a>>,
}

#[derive(Serialize)]
struct Question<'a> {
    /// Kind, length and number.
    name: &'a str,
    /// The context, the question and the answer.
    tokens: &'a [u32],
    /// Tokens before the question.
    context: usize,
    /// Tokens of the answer, the last ones.
    answer: usize,
}
