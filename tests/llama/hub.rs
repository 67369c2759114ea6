//! A hub on this machine that serves a folder's files, or other answers for some of them.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;

/// The hub's answer for a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Status(u16),
    /// No answer, for as long as the client waits.
    Silence,
}

pub struct Hub {
    pub endpoint: String,
    /// Names of requested files.
    asked: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    /// Serves `folder` under any model id, with 404 for files that it lacks.
    pub fn serve(folder: &Path, answers: &[(&'static str, Answer)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (folder, answers, heard) = (PathBuf::from(folder), answers.to_vec(), asked.clone());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (folder, answers, heard) = (folder.clone(), answers.clone(), heard.clone());
                thread::spawn(move || answer(stream, &folder, &answers, &heard));
            }
        });
        Self { endpoint, asked }
    }

    pub fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

fn answer(mut stream: TcpStream, folder: &Path, answers: &[(&'static str, Answer)], asked: &Mutex<Vec<String>>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap())
        .lines()
        .map_while(Result::ok);
    let Some(request) = lines.next() else { return };
    let mut range = None;
    for line in lines.take_while(|line| !line.is_empty()) {
        if let Some((_, bytes)) = line.to_lowercase().split_once("range: bytes=") {
            let (first, last) = bytes.split_once('-').unwrap();
            range = Some((first.parse::<usize>().unwrap(), last.trim().parse::<usize>().ok()));
        }
    }
    let path = request.split_whitespace().nth(1).unwrap_or_default();
    let name = path.rsplit('/').next().unwrap_or_default().to_string();
    asked.lock().unwrap().push(name.clone());
    let told = answers.iter().find(|(other, _)| *other == name);
    let status = match (told, fs::read(folder.join(&name))) {
        (Some((_, Answer::Silence)), _) => {
            // Until the client hangs up.
            let _ = std::io::Read::read(&mut stream, &mut [0]);
            return;
        }
        (Some((_, Answer::Status(status))), _) => *status,
        (None, Err(_)) => 404,
        (None, Ok(bytes)) => {
            let (first, last) = range.unwrap_or((0, None));
            let end = last.map_or(bytes.len(), |last| bytes.len().min(last + 1));
            let head = format!(
                "HTTP/1.1 206 Partial Content\r\nConnection: close\r\nx-repo-commit: c0ffee\r\netag: \"{name}\"\r\n\
                 Content-Range: bytes {first}-{}/{}\r\nContent-Length: {}\r\n\r\n",
                end - 1,
                bytes.len(),
                end - first
            );
            let _ = stream.write_all(head.as_bytes());
            let _ = stream.write_all(&bytes[first..end]);
            return;
        }
    };
    let head = format!("HTTP/1.1 {status} Told So\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
    let _ = stream.write_all(head.as_bytes());
}
