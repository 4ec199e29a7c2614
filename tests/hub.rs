//! A local server with the layout of the Hugging Face hub. Must not contain a test.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// The commit of all files.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// The commit that follows once [`NEWER`] is served.
pub const COMMIT_2: &str = "89abcdef0123456789abcdef0123456789abcdef";
/// A file that is in the second commit only.
pub const NEWER: &str = "a/moved/NEWER.md";

/// One file on the server.
#[derive(Clone)]
pub struct Served {
    /// Its content.
    pub bytes: Vec<u8>,
    /// SHA-256 that the server announces, if it is a large file.
    pub sha256: Option<String>,
    /// So many answers stop after so many bytes.
    pub cut: Option<(usize, usize)>,
}

impl Served {
    /// A file that the server announces without a SHA-256.
    pub fn small(text: &str) -> Self {
        Self { bytes: text.into(), sha256: None, cut: None }
    }

    /// A file with its SHA-256.
    pub fn large(bytes: Vec<u8>) -> Self {
        let sha256 = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        Self { bytes, sha256: Some(sha256), cut: None }
    }
}

/// Files by `REPOSITORY/NAME`.
pub type Files = BTreeMap<String, Served>;

/// A server with the hub's layout, and the requests that it got.
pub struct Hub {
    /// What `HF_ENDPOINT` must be.
    pub address: String,
    files: Arc<Mutex<Files>>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    /// Starts serving.
    ///
    /// # Errors
    /// If no port is free.
    pub fn start(files: Files) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = format!("http://{}", listener.local_addr()?);
        let (files, asked) = (Arc::new(Mutex::new(files)), Arc::new(Mutex::new(Vec::new())));
        let (served, log) = (files.clone(), asked.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (files, log) = (served.clone(), log.clone());
                std::thread::spawn(move || while answer(&stream, &files, &log).is_ok_and(|more| more) {});
            }
        });
        Ok(Self { address, files, asked })
    }

    /// Serves another version of a file from now on.
    pub fn replace(&self, name: &str, file: Served) {
        if let Ok(mut files) = self.files.lock() {
            files.insert(name.to_owned(), file);
        }
    }

    /// All requests so far: path, `with` token, `(size)` if it asked for the first byte only, and the byte it began at.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().map(|asked| asked.clone()).unwrap_or_default()
    }
}

/// What a revision is: `main` and the tag `v1` are the newest commit, which has another name once `NEWER` is served.
fn commit(revision: &str, files: &Files) -> Option<&'static str> {
    let newest = if files.contains_key(NEWER) { COMMIT_2 } else { COMMIT };
    match revision {
        "main" => Some(newest),
        "v1" | COMMIT => Some(COMMIT),
        COMMIT_2 => Some(COMMIT_2),
        _ => None,
    }
}

/// Answers one request; whether the connection goes on.
fn answer(mut stream: &TcpStream, files: &Mutex<Files>, log: &Mutex<Vec<String>>) -> Result<bool> {
    let mut lines = BufReader::new(stream).lines();
    let Some(first) = lines.next().transpose()? else { return Ok(false) };
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let (mut start, mut whole, mut token) = (0, true, String::new());
    for line in lines.by_ref() {
        let line = line?.to_ascii_lowercase();
        if let Some(range) = line.strip_prefix("range: bytes=") {
            let (from, to) = range.split_once('-').context("range")?;
            (start, whole) = (from.parse()?, to.is_empty());
        }
        if let Some(value) = line.strip_prefix("authorization: ") {
            token = format!(" with {value}");
        }
        if line.is_empty() {
            break;
        }
    }
    let kind = if whole { "" } else { " (size)" };
    log.lock().map_err(|_| anyhow::anyhow!("log"))?.push(format!("{path}{token}{kind} from {start}"));
    let mut files = files.lock().map_err(|_| anyhow::anyhow!("files"))?;
    let missing = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n";
    if let Some(rest) = path.strip_prefix("/api/models/") {
        let (repository, revision) = rest.split_once("/revision/").context("revision")?;
        let names: Vec<String> = files
            .keys()
            .filter_map(|f| f.strip_prefix(&format!("{repository}/")))
            .map(str::to_owned)
            .collect();
        let Some(commit) = commit(revision, &files).filter(|_| !names.is_empty()) else {
            stream.write_all(missing.as_bytes())?;
            return Ok(true);
        };
        let siblings: Vec<_> = names.iter().map(|name| serde_json::json!({ "rfilename": name })).collect();
        let body = serde_json::json!({ "siblings": siblings, "sha": commit }).to_string();
        write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        return Ok(true);
    }
    let (repository, rest) = path.trim_start_matches('/').split_once("/resolve/").context("resolve")?;
    let (revision, file) = rest.split_once('/').context("file")?;
    let name = format!("{repository}/{file}");
    let commit = commit(revision, &files);
    let (Some(commit), Some(file)) = (commit, files.get_mut(&name)) else {
        stream.write_all(missing.as_bytes())?;
        return Ok(true);
    };
    let end = if whole { file.bytes.len() } else { (start + 1).min(file.bytes.len()) };
    let part = &file.bytes[start.min(end)..end];
    let small = || Sha256::digest(&file.bytes).iter().take(20).map(|b| format!("{b:02x}")).collect();
    let etag = file.sha256.clone().unwrap_or_else(small);
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\nETag: \"{etag}\"\r\nX-Repo-Commit: {commit}\r\nContent-Range: bytes {start}-{}/{}\r\n\
         Content-Length: {}\r\n\r\n",
        end.saturating_sub(1),
        file.bytes.len(),
        part.len()
    )?;
    if let (true, Some((left, cut))) = (whole, file.cut) {
        file.cut = Some((left - 1, cut)).filter(|(left, _)| *left > 0);
        stream.write_all(&part[..cut.min(part.len())])?;
        stream.shutdown(std::net::Shutdown::Both)?;
        return Ok(false);
    }
    stream.write_all(part)?;
    Ok(true)
}
