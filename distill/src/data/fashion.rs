//! Fashion-MNIST by name: found on this machine or downloaded, checked by SHA-256.
//! Xiao et al. 2017 (arXiv:1708.07747), MIT licence.

use std::io::Read;
use std::path::{Path, PathBuf};

use super::idx::{decompress, join};
use super::{Dataset, Split};
use crate::error::{Error, Result};
use crate::files;

/// Names of the ten classes, in order.
pub const FASHION_CLASSES: [&str; 10] = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
];

/// Where Debian's package `dataset-fashion-mnist` puts the files.
const DEBIAN: &str = "/usr/share/datasets/fashion-mnist";
/// Where the authors publish them.
const PUBLISHED: &str = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com";
/// Replaces [`PUBLISHED`], for mirrors.
const MIRROR_VARIABLE: &str = "DMD_FASHION_MNIST_URL";

/// File stem and SHA-256 of the decompressed content: training images and labels, test images and labels.
const FILES: [(&str, &str); 4] = [
    ("train-images-idx3-ubyte", "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
    ("train-labels-idx1-ubyte", "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    ("t10k-images-idx3-ubyte", "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    ("t10k-labels-idx1-ubyte", "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
];

impl Dataset {
    /// Fashion-MNIST from `folder`, else from Debian's package, else from the cache, else by download.
    pub fn fashion_mnist(folder: Option<&Path>, split: Split) -> Result<Self> {
        let first = if split == Split::Train { 0 } else { 2 };
        let read = |i: usize| fashion_file(folder, FILES[i].0, FILES[i].1);
        join(&read(first)?, &read(first + 1)?)
    }
}

/// Number of images of a part.
pub fn count(split: Split) -> usize {
    if split == Split::Train { 60_000 } else { 10_000 }
}

/// Whether this is the SHA-256 of one of the files, decompressed.
pub fn is_known(sha256: &str) -> bool {
    FILES.iter().any(|(_, known)| *known == sha256)
}

fn fashion_file(folder: Option<&Path>, stem: &str, sha256: &str) -> Result<(PathBuf, Vec<u8>)> {
    let cache = cache_folder();
    let folders = match folder {
        Some(folder) => vec![folder.to_owned()],
        None => std::iter::once(PathBuf::from(DEBIAN)).chain(cache.clone()).collect(),
    };
    for folder in &folders {
        for name in [format!("{stem}.gz"), stem.to_owned()] {
            let path = folder.join(name);
            if path.is_file() {
                let bytes = decompress(&path, files::read(&path)?)?;
                verify(&path, &bytes, sha256)?;
                return Ok((path, bytes));
            }
        }
    }
    if let Some(folder) = folder {
        return Err(Error::content(
            folder,
            format!(
                "there is no `{stem}.gz`\n\nhint: `--data` names the folder with the four Fashion-MNIST files"
            ),
        ));
    }
    let cache = cache.ok_or_else(|| Error::Request("no home folder to keep the data set in".into()))?;
    let base = std::env::var(MIRROR_VARIABLE).unwrap_or_else(|_| PUBLISHED.to_owned());
    fetch(&base, &cache, stem, sha256)
}

/// `stem`.gz from below the address `base`, kept in the folder `cache` if its content is the expected one.
fn fetch(base: &str, cache: &Path, stem: &str, sha256: &str) -> Result<(PathBuf, Vec<u8>)> {
    let (url, path) = (format!("{}/{stem}.gz", base.trim_end_matches('/')), cache.join(format!("{stem}.gz")));
    dmd_cli::say!("downloading {url}");
    let compressed = download(&url)?;
    let bytes = decompress(&path, compressed.clone())?;
    verify(&path, &bytes, sha256)?;
    files::write(&path, &compressed)?;
    Ok((path, bytes))
}

fn cache_folder() -> Option<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))?;
    Some(base.join("dmd").join("fashion-mnist"))
}

fn download(url: &str) -> Result<Vec<u8>> {
    let fail = |e: &dyn std::fmt::Display| {
        Error::Request(format!(
            "cannot download `{url}`: {e}\n\nhint: install Debian's package `dataset-fashion-mnist`, or put the four \
             files in a folder and name it with `--data`"
        ))
    };
    let response = ureq::get(url).call().map_err(|e| fail(&e))?;
    let mut body = Vec::new();
    let mut reader = response.into_body().into_reader().take(1 << 28);
    reader.read_to_end(&mut body).map_err(|e| fail(&e))?;
    Ok(body)
}

fn verify(path: &Path, bytes: &[u8], expected: &str) -> Result<()> {
    let got = files::sha256(bytes);
    if got == expected {
        return Ok(());
    }
    Err(Error::content(
        path,
        format!(
            "got SHA-256 {got} of the decompressed file, expected {expected}\n\nhint: delete it and fetch it again"
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The address of a server that answers each request with the next of `answers`: a promised length and a body.
    fn serve(answers: Vec<(usize, Vec<u8>)>) -> String {
        use std::io::{BufRead, BufReader, Write};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for (length, body) in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let request = BufReader::new(stream.try_clone().unwrap()).lines();
                assert_eq!(
                    request.map_while(std::result::Result::ok).find(|line| line.is_empty()),
                    Some(String::new())
                );
                let head =
                    format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
                stream.write_all(&[head.as_bytes(), &body].concat()).unwrap();
            }
        });
        format!("http://{address}/")
    }

    #[test]
    fn a_download_is_kept_only_if_it_is_whole_and_the_right_one() {
        use std::io::Write;
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        let content = [0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9];
        gz.write_all(&content).unwrap();
        let gz = gz.finish().unwrap();
        let cut = gz[..gz.len() - 3].to_vec();
        let url =
            serve(vec![(gz.len(), cut.clone()), (cut.len(), cut), (gz.len(), gz.clone()), (gz.len(), gz)]);
        let cache = tempfile::tempdir().unwrap();
        let get = |sha: &str| fetch(&url, cache.path(), "file", sha).map_err(|e| e.to_string());
        let right = files::sha256(&content);
        assert!(get(&right).unwrap_err().contains("cannot download"));
        assert!(get(&right).unwrap_err().contains("not a complete gzip file"));
        assert!(get(&files::sha256(b"other")).unwrap_err().contains("SHA-256"));
        assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 0, "a bad download was kept");
        let (path, bytes) = get(&right).unwrap();
        assert!(path.is_file() && bytes == content);
        assert!(get(&right).unwrap_err().contains("cannot download"), "the server is gone");
    }

    #[test]
    fn a_changed_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("train-images-idx3-ubyte"), b"not the data").unwrap();
        let err = Dataset::fashion_mnist(Some(folder.path()), Split::Train).err().unwrap().to_string();
        assert!(err.contains("SHA-256"), "{err}");
    }
}
