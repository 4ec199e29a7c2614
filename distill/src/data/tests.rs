//! Every format from tiny files, resizing, labels, and what is refused.

use std::io::Write;

use image::{DynamicImage, GrayImage, Luma, Rgb, RgbImage};

use super::pickle::Pickle;
use super::*;

/// The fixture of `scripts/golden_cifar.py`.
const CIFAR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/cifar-10-batches-py");
const CIFAR_SHAPE: [usize; 3] = [3, 32, 32];

fn text(folder: &Path) -> &str {
    folder.to_str().unwrap()
}

fn load(folder: &Path, split: Split, shape: [usize; 3]) -> std::result::Result<Loaded, String> {
    Source::find(text(folder), split).and_then(|source| source.load(shape)).map_err(|e| e.to_string())
}

#[track_caller]
fn refused(folder: &Path, split: Split, says: &[&str]) {
    let message = load(folder, split, CIFAR_SHAPE).err().expect("not refused");
    for part in says {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

fn idx_file(sizes: &[u32], data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0, 8, sizes.len() as u8];
    sizes.iter().for_each(|size| bytes.extend(size.to_be_bytes()));
    [bytes.as_slice(), data].concat()
}

fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(bytes).unwrap();
    gz.finish().unwrap()
}

#[test]
fn idx_files_are_found_by_the_ends_of_their_names() {
    let (images, labels) = (idx_file(&[2, 2, 2], &[0, 10, 20, 30, 40, 50, 60, 70]), idx_file(&[2], &[7, 3]));
    let cases = [
        (["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"], Split::Train),
        (["train-images.idx3-ubyte", "train-labels.idx1-ubyte.gz"], Split::Train),
        (["emnist-digits-test-images-idx3-ubyte.gz", "emnist-digits-test-labels-idx1-ubyte.gz"], Split::Test),
        (["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"], Split::Test),
    ];
    for (names, split) in cases {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in names.iter().zip([&images, &labels]) {
            let bytes = if name.ends_with(".gz") { gz(bytes) } else { bytes.clone() };
            std::fs::write(folder.path().join(name), bytes).unwrap();
        }
        let source = Source::find(text(folder.path()), split).unwrap();
        assert_eq!(source.count().unwrap(), 2);
        let found = source.load([1, 2, 2]).unwrap();
        assert_eq!(found.data.images, [0, 10, 20, 30, 40, 50, 60, 70]);
        assert_eq!((found.data.labels, found.classes, found.data.shape), (vec![7, 3], None, [1, 2, 2]));
        let other = if split == Split::Train { Split::Test } else { Split::Train };
        refused(folder.path(), other, &["there are idx files, but no"]);
        std::fs::write(folder.path().join(names[1]), idx_file(&[3], &[7, 3, 1])).unwrap();
        refused(folder.path(), split, &["[2, 2, 2] images do not go with [3] labels"]);
    }
}

fn cifar_image(i: usize) -> Vec<u8> {
    (0..3072).map(|k| ((37 * i + 11 * k + k / 32) % 256) as u8).collect()
}

#[test]
fn both_versions_of_cifar_10_give_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let inside = folder.path().join("cifar-10-batches-bin");
    std::fs::create_dir(&inside).unwrap();
    let record = |i: usize| [vec![(3 * i % 10) as u8], cifar_image(i)].concat();
    for i in 0..5 {
        std::fs::write(inside.join(format!("data_batch_{}.bin", i + 1)), record(i)).unwrap();
    }
    std::fs::write(inside.join("test_batch.bin"), [record(5), record(6)].concat()).unwrap();
    for (split, range) in [(Split::Train, 0..5), (Split::Test, 5..7)] {
        for path in [folder.path(), Path::new(CIFAR)] {
            let source = Source::find(text(path), split).unwrap();
            assert_eq!(source.count().unwrap(), range.len());
            let found = source.load(CIFAR_SHAPE).unwrap();
            let images: Vec<u8> = range.clone().flat_map(cifar_image).collect();
            let labels: Vec<u8> = range.clone().map(|i| (3 * i % 10) as u8).collect();
            assert!(found.data.images == images && found.data.labels == labels, "{}", path.display());
            assert_eq!(found.classes.unwrap()[9], "truck");
        }
    }
    std::fs::write(inside.join("data_batch_2.bin"), &record(0)[1..]).unwrap();
    refused(folder.path(), Split::Train, &["data_batch_2.bin", "3072 bytes", "multiple of 3073"]);
    std::fs::write(inside.join("data_batch_2.bin"), [vec![10], cifar_image(0)].concat()).unwrap();
    refused(folder.path(), Split::Train, &["data_batch_2.bin", "the label 10"]);
    std::fs::remove_file(inside.join("data_batch_3.bin")).unwrap();
    refused(folder.path(), Split::Train, &["there is no `data_batch_3.bin`"]);
}

#[test]
fn a_batch_with_code_in_it_is_refused_and_not_run() {
    let folder = tempfile::tempdir().unwrap();
    for i in 1..=5 {
        let name = format!("data_batch_{i}");
        std::fs::copy(Path::new(CIFAR).join(&name), folder.path().join(&name)).unwrap();
    }
    let first = folder.path().join("data_batch_1");
    std::fs::copy(Path::new(CIFAR).join("code/data_batch_1"), &first).unwrap();
    refused(folder.path(), Split::Train, &["data_batch_1", "`posix.system`", "nothing in it was executed"]);
    std::fs::write(&first, b"\x80\x02}.").unwrap();
    refused(folder.path(), Split::Train, &["data_batch_1", "no entry `data`"]);
    std::fs::write(&first, b"PK\x03\x04").unwrap();
    refused(folder.path(), Split::Train, &["data_batch_1", "opcode 0x50"]);
}

fn grey(path: &Path, width: u32, height: u32, value: u8) {
    GrayImage::from_pixel(width, height, Luma([value])).save(path).unwrap();
}

#[test]
fn pictures_lie_flat_or_by_class() {
    let folder = tempfile::tempdir().unwrap();
    grey(&folder.path().join("b.png"), 3, 2, 200);
    grey(&folder.path().join("a.PNG"), 5, 5, 100);
    std::fs::write(folder.path().join("notes.txt"), "not a picture").unwrap();
    std::fs::write(folder.path().join(".hidden.png"), "not a picture").unwrap();
    let flat = load(folder.path(), Split::Train, [1, 2, 2]).unwrap();
    assert_eq!((flat.data.images, flat.data.labels), (vec![100, 100, 100, 100, 200, 200, 200, 200], vec![]));
    refused(folder.path(), Split::Test, &["no test images", "hint:"]);

    let parts = tempfile::tempdir().unwrap();
    for (path, value) in
        [("train/dog/1.png", 1), ("train/cat/x.png", 2), ("train/dog/2.png", 3), ("test/cat/y.png", 4)]
    {
        let path = parts.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        grey(&path, 1, 1, value);
    }
    let train = load(parts.path(), Split::Train, [1, 1, 1]).unwrap();
    assert_eq!((train.data.images, train.data.labels), (vec![2, 1, 3], vec![0, 1, 1]));
    assert_eq!(train.classes.unwrap(), ["cat", "dog"]);
    assert!(train.about.ends_with("`, training images"), "{}", train.about);
    let test = load(parts.path(), Split::Test, [1, 1, 1]).unwrap();
    assert_eq!((test.data.images, test.data.labels), (vec![4], vec![0]));
    assert_ne!(test.sha256, train.sha256);
    std::fs::remove_dir_all(parts.path().join("test")).unwrap();
    refused(parts.path(), Split::Test, &["there is no `test/`"]);
}

#[test]
fn a_jpeg_is_read_whatever_its_name_says() {
    let folder = tempfile::tempdir().unwrap();
    let picture = RgbImage::from_pixel(16, 16, Rgb([200, 100, 50]));
    picture.save_with_format(folder.path().join("a.jpeg"), image::ImageFormat::Jpeg).unwrap();
    picture.save_with_format(folder.path().join("b.jpg"), image::ImageFormat::Png).unwrap();
    let found = load(folder.path(), Split::Train, [3, 1, 1]).unwrap();
    for (got, expected) in found.data.images.iter().zip([200, 100, 50, 200, 100, 50]) {
        assert!(got.abs_diff(expected) < 5, "{:?}", found.data.images);
    }
}

#[test]
fn folders_that_say_no_clear_thing_are_refused() {
    let empty = tempfile::tempdir().unwrap();
    refused(empty.path(), Split::Train, &["no data set in it", "idx", "data_batch_1", "PNG or JPEG"]);
    refused(Path::new("/nowhere"), Split::Train, &["`--data /nowhere`", "no such folder", "fashion-mnist"]);

    let folder = tempfile::tempdir().unwrap();
    let class = folder.path().join("cat");
    std::fs::create_dir(&class).unwrap();
    grey(&class.join("1.png"), 1, 1, 0);
    std::fs::create_dir(folder.path().join("dog")).unwrap();
    refused(folder.path(), Split::Train, &["dog", "no image in it"]);
    std::fs::create_dir(folder.path().join("dog/deep")).unwrap();
    refused(folder.path(), Split::Train, &["dog", "`deep/`", "nested"]);
    std::fs::remove_dir_all(folder.path().join("dog")).unwrap();
    grey(&folder.path().join("2.png"), 1, 1, 0);
    refused(folder.path(), Split::Train, &["directly in it and in `cat/`"]);
    std::fs::remove_dir_all(&class).unwrap();
    std::fs::write(folder.path().join("3.webp"), "").unwrap();
    refused(folder.path(), Split::Train, &["3.webp", "PNG or JPEG"]);
    std::fs::remove_file(folder.path().join("3.webp")).unwrap();
    for i in 0..7 {
        std::fs::write(folder.path().join(format!("broken-{i}.png")), b"\x89PNG").unwrap();
    }
    refused(folder.path(), Split::Train, &["7 of its images", "broken-0.png", "broken-4.png", "and 2 more"]);
}

#[test]
fn pictures_are_squashed_to_size_and_channels() {
    let wide = GrayImage::from_fn(8, 2, |x, _| Luma([if x < 4 { 0 } else { 200 }]));
    let wide = DynamicImage::from(wide);
    assert_eq!(picture::planes(&wide, [1, 2, 8]), wide.to_luma8().into_raw(), "the same size stays as it is");
    let small = picture::planes(&wide, [3, 1, 2]);
    assert_eq!(small[..2], small[2..4]);
    assert!(small[0] < 60 && small[1] > 140, "{small:?}");
    let narrow = picture::planes(&wide, [1, 2, 4]);
    assert!(narrow[0] == 0 && narrow[3] == 200 && narrow[1] < narrow[2], "{narrow:?}");
    let colours = Dataset { shape: [3, 1, 2], images: vec![255, 0, 255, 0, 255, 255], labels: vec![4] };
    let grey = picture::fit(colours, [1, 1, 2]).unwrap();
    assert_eq!((grey.shape, grey.images[0], grey.labels), ([1, 1, 2], 255, vec![4]));
    assert!(grey.images[1] < 40, "blue is dark: {:?}", grey.images);
}

#[test]
fn a_transparent_or_deep_picture_becomes_8_bits() {
    let folder = tempfile::tempdir().unwrap();
    let deep = image::ImageBuffer::from_pixel(1, 1, image::Rgba([65535u16, 0, 32768, 100]));
    deep.save(folder.path().join("a.png")).unwrap();
    let found = load(folder.path(), Split::Train, [3, 1, 1]).unwrap();
    assert_eq!(found.data.images, [255, 0, 128]);
}

#[test]
fn labels_must_be_classes_of_the_base() {
    let data = |labels: &[u8]| Dataset { shape: [1, 1, 1], images: vec![0; 2], labels: labels.to_vec() };
    assert!(data(&[0, 9]).check_labels(10, "b").is_ok());
    let message = data(&[0, 10]).check_labels(10, "b").unwrap_err().to_string();
    assert!(message.contains("label 10, expected 0 to 9"), "{message}");
    let message = data(&[]).check_labels(10, "b").unwrap_err().to_string();
    assert!(message.contains("the images have none"), "{message}");
    assert_eq!(data(&[]).len(), 2);
}

#[test]
fn flipping_exchanges_left_and_right_of_single_images() {
    let data = Dataset { shape: [2, 1, 2], images: vec![0, 51, 102, 153, 204, 255, 0, 51], labels: vec![] };
    let batch = data.batch_flipped(&[1, 0], &[true, false], [0.0, 5.0], &Device::Cpu).unwrap();
    assert_eq!(batch.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [5., 4., 1., 0., 0., 1., 2., 3.]);
}

/// `{'labels': [3, 300], 'data': array([[1, 2, 3]], uint8)}` in the opcodes of Python 2.
const PYTHON2: &[u8] = b"\x80\x02}q\x01(U\x06labelsq\x02]q\x03(K\x03M\x2c\x01eU\x04dataq\x04cnumpy.core.multiarray\n\
    _reconstruct\nq\x05cnumpy\nndarray\nq\x06K\x00\x85U\x01b\x87Rq\x07(K\x01K\x01K\x03\x86cnumpy\ndtype\nq\x08U\x02u1K\x00K\x01\
    \x87Rq\x09(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x03\x00\x00\x00\x01\x02\x03tbu.";

#[test]
fn python_2_s_strings_are_read() {
    let pickle = Pickle::read(PYTHON2).unwrap();
    let data = pickle.bytes_array(pickle.entry("data").unwrap()).unwrap();
    assert_eq!(data, (vec![1, 3], &[1, 2, 3][..]));
    assert_eq!(pickle.integers(pickle.entry("labels").unwrap()).unwrap(), [3, 300]);
    assert!(pickle.entry("filenames").is_none() && pickle.bytes_array(0).is_err());
}

/// A pickle that would run a command is refused by the name of the function.
#[test]
fn code_is_named_and_not_run() {
    let code = b"\x80\x02cos\nsystem\nq\x00X\x08\x00\x00\x00touch me\x85R.";
    assert_eq!(Pickle::read(code).unwrap_err(), pickle::Error::Foreign("os.system".into()));
}

/// Cut or changed anywhere, it is an error or another value, never a panic.
#[test]
fn damage_never_panics() {
    for end in 0..PYTHON2.len() {
        assert!(Pickle::read(&PYTHON2[..end]).is_err(), "{end}");
    }
    for place in 0..PYTHON2.len() {
        for byte in 0..=255 {
            let mut bytes = PYTHON2.to_vec();
            bytes[place] = byte;
            if let Ok(pickle) = Pickle::read(&bytes) {
                let _ = pickle.entry("data").map(|id| pickle.bytes_array(id).is_ok());
                let _ = pickle.entry("labels").map(|id| pickle.integers(id).is_ok());
            }
        }
    }
}

/// A text that is written once and encoded many times would fill any memory, as would values of a byte each.
#[test]
fn a_pickle_makes_no_more_than_it_holds() {
    let text = |text: &str| [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    let once = [
        b"\x80\x02c_codecs\nencode\nq\x00".to_vec(),
        text(&"t".repeat(100)),
        text("latin1"),
        b"\x86q\x01R".to_vec(),
    ];
    let once = once.concat();
    assert!(Pickle::read(&[&once[..], b"."].concat()).is_ok());
    let again = [&once[..], &b"h\x00h\x01R".repeat(9), b"."].concat();
    let problem = format!("{:?}", Pickle::read(&again).unwrap_err());
    assert!(problem.contains("again and again"), "{problem}");
    for bytes in [vec![b'N'; 2 << 20], [vec![b'N'], vec![0x94; 2 << 20]].concat()] {
        let problem = format!("{:?}", Pickle::read(&bytes).unwrap_err());
        assert!(problem.contains("more than 1048576 values"), "{problem}");
    }
}
