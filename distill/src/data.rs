//! Real images: Fashion-MNIST from idx files, found on this machine or downloaded, checked by SHA-256.
//! Xiao et al. 2017 (arXiv:1708.07747), MIT licence.

use std::io::Read;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use flate2::read::GzDecoder;

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

/// Labelled 8-bit images.
pub struct Dataset {
    /// `[channels, height, width]`.
    pub shape: [usize; 3],
    /// One byte per value, image by image, channel planes.
    pub images: Vec<u8>,
    /// Class of each image.
    pub labels: Vec<u8>,
}

/// Which part of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// For training.
    Train,
    /// Held out.
    Test,
}

impl Dataset {
    /// Fashion-MNIST from `folder`, else from Debian's package, else from the cache, else by download.
    pub fn fashion_mnist(folder: Option<&Path>, split: Split) -> Result<Self> {
        let first = if split == Split::Train { 0 } else { 2 };
        let read = |i: usize| fashion_file(folder, FILES[i].0, FILES[i].1);
        Self::from_idx(&read(first)?, &read(first + 1)?)
    }

    fn from_idx(
        (path, images): &(PathBuf, Vec<u8>),
        (label_path, labels): &(PathBuf, Vec<u8>),
    ) -> Result<Self> {
        let (size, pixels) = idx(path, images)?;
        let (count, labels) = idx(label_path, labels)?;
        match (size.as_slice(), count.as_slice()) {
            ([n, height, width], [m]) if n == m => {
                Ok(Self { shape: [1, *height, *width], images: pixels.to_vec(), labels: labels.to_vec() })
            }
            _ => Err(Error::content(path, format!("{size:?} images do not go with {count:?} labels"))),
        }
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// The images at `indices`, in `range`.
    ///
    /// # Shapes
    /// `[indices, c, h, w]` f32.
    pub fn batch(&self, indices: &[usize], [lo, hi]: [f32; 2], device: &Device) -> Result<Tensor> {
        let [c, h, w] = self.shape;
        let size = c * h * w;
        let values: Vec<f32> = indices
            .iter()
            .flat_map(|i| &self.images[i * size..(i + 1) * size])
            .map(|v| lo + (hi - lo) * f32::from(*v) / 255.0)
            .collect();
        Ok(Tensor::from_vec(values, (indices.len(), c, h, w), device)?)
    }
}

/// Sizes and bytes of an idx file of unsigned bytes.
fn idx<'a>(path: &Path, bytes: &'a [u8]) -> Result<(Vec<usize>, &'a [u8])> {
    let bad = |problem: String| Error::content(path, format!("not an idx file: {problem}"));
    let axes = match bytes {
        [0, 0, 8, axes @ 1..=4, ..] => usize::from(*axes),
        _ => return Err(bad("it does not start with 0, 0, 8 and the number of axes".into())),
    };
    let header = 4 + 4 * axes;
    let sizes = bytes.get(4..header).ok_or_else(|| bad("the header is cut short".into()))?;
    let sizes: Vec<usize> =
        sizes.chunks_exact(4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]) as usize).collect();
    let expected = sizes.iter().try_fold(1usize, |a, b| a.checked_mul(*b));
    let data = &bytes[header..];
    if expected != Some(data.len()) {
        return Err(bad(format!("got {} bytes of data for sizes {sizes:?}", data.len())));
    }
    Ok((sizes, data))
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
    eprintln!("downloading {url}");
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

fn decompress(path: &Path, bytes: Vec<u8>) -> Result<Vec<u8>> {
    if !bytes.starts_with(&[0x1f, 0x8b]) {
        return Ok(bytes);
    }
    let mut out = Vec::new();
    GzDecoder::new(bytes.as_slice())
        .take(1 << 28)
        .read_to_end(&mut out)
        .map_err(|e| Error::content(path, format!("not a complete gzip file: {e}")))?;
    Ok(out)
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

    #[test]
    fn an_idx_file_says_how_long_it_is() {
        let path = Path::new("x");
        let good = [0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 0, 3, 7, 8, 9];
        assert_eq!(idx(path, &good).unwrap(), (vec![1, 3], &good[12..]));
        for bad in [&good[..14], &good[..10], &good[..2], &[0, 0, 13, 1, 0, 0, 0, 0], &[]] {
            assert!(idx(path, bad).is_err(), "{bad:?}");
        }
    }

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
        gz.write_all(b"content").unwrap();
        let gz = gz.finish().unwrap();
        let cut = gz[..gz.len() - 3].to_vec();
        let url =
            serve(vec![(gz.len(), cut.clone()), (cut.len(), cut), (gz.len(), gz.clone()), (gz.len(), gz)]);
        let cache = tempfile::tempdir().unwrap();
        let get = |sha: &str| fetch(&url, cache.path(), "file", sha).map_err(|e| e.to_string());
        let right = files::sha256(b"content");
        assert!(get(&right).unwrap_err().contains("cannot download"));
        assert!(get(&right).unwrap_err().contains("not a complete gzip file"));
        assert!(get(&files::sha256(b"other")).unwrap_err().contains("SHA-256"));
        assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 0, "a bad download was kept");
        let (path, bytes) = get(&right).unwrap();
        assert!(path.is_file() && bytes == b"content");
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
