//! Refusals that no other test provokes: each by the program itself, exit code 2, with the text that docs/errors.md lists.
//! `scripts/errors --check` compares that list with the code and with the texts that tests expect.

mod models;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use dmd_tests::{fixture, interrupt_distill, refused, repository, run_bin};
use image::{GrayImage, Luma};
use serde_json::{Value, json};
use tempfile::TempDir;
use tract_onnx::pb::tensor_proto::DataType;
use zip::write::SimpleFileOptions;

use crate::models::{card_json, identity, model, node, port};

const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

/// The program refuses a command line with all these words.
fn says(cwd: &Path, line: &str, texts: &[&str]) -> Result<()> {
    let mut words = line.split_whitespace();
    let program = words.next().context("no program")?;
    refused(&run_bin(program, cwd, words)?, texts).with_context(|| line.to_owned())
}

/// `base/`: the class-conditional fixture.
fn base(cwd: &Path) -> Result<()> {
    fs::create_dir_all(cwd.join("base"))?;
    for entry in fs::read_dir(fixture("tiny-class"))? {
        let path = entry?.path();
        fs::copy(&path, cwd.join("base").join(path.file_name().context("no name")?))?;
    }
    Ok(())
}

/// Changes one key of a JSON file.
fn set(path: &Path, key: &str, value: Value) -> Result<()> {
    let mut all: Value = serde_json::from_slice(&fs::read(path)?)?;
    all[key] = value;
    Ok(fs::write(path, all.to_string())?)
}

/// `run/`: a distillation of `base/` of one update.
fn run(cwd: &Path) -> Result<()> {
    base(cwd)?;
    let line = "--base ./base --out run --train-steps 1 --batch 2 --pairs 2 --pair-steps 2 --fake-updates 1 --samples 2 \
                --pairs-dir pairs";
    let done = run_bin("dmd-distill", cwd, line.split_whitespace())?;
    ensure!(done.code == Some(0), "{done:?}");
    Ok(())
}

#[test]
fn the_list_of_messages_is_that_of_the_code_and_every_message_is_tested() -> Result<()> {
    let done = Command::new(repository().join("scripts/errors")).arg("--check").output()?;
    ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    Ok(())
}

#[test]
fn configurations() -> Result<()> {
    let dir = TempDir::new()?;
    let cwd = dir.path();
    for (key, value, text) in [
        ("time_embedding_type", json!("fourier"), "got \"fourier\", only \"positional\" is implemented"),
        ("encoder_hid_dim", json!(3), "got 3, this key is not implemented"),
        ("block_out_channels", json!([9, 8, 16]), "the first must be even (sine and cosine halves)"),
        ("downsample_padding", json!(2), "got 2, expected 0 or 1"),
        ("freq_shift", json!(4), "got 4, which divides by zero"),
        ("mid_block_scale_factor", json!(0), "got 0, expected a positive number"),
        ("sample_size", json!("big"), "got \"big\", expected the image side in pixels"),
        ("act_fn", json!(7), "config key `act_fn`: got 7"),
    ] {
        base(cwd)?;
        let path = cwd.join("base/config.json");
        if key == "block_out_channels" {
            set(&path, "norm_num_groups", json!(1))?;
            set(&path, "attention_head_dim", json!(1))?;
        }
        set(&path, key, value)?;
        says(cwd, "dmd-distill --base ./base --dry-run", &["config.json", text])?;
        says(cwd, "dmd-export m.onnx --from base --teacher", &["config.json", text])?;
    }
    base(cwd)?;
    set(&cwd.join("base/scheduler_config.json"), "trained_betas", json!([0.1, 0.2]))?;
    says(cwd, "dmd-distill --base ./base --dry-run", &["got 2 values, expected 1000 steps"])?;
    base(cwd)?;
    fs::write(cwd.join("base/config.json"), "[]")?;
    says(cwd, "dmd-export m.onnx --from base --teacher", &["not a JSON object"])
}

/// A pickle's text.
fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A numpy array `[0, 3072]` of bytes.
fn empty_array() -> Vec<u8> {
    let dtype = [&b"cnumpy\ndtype\n("[..], &text("u1"), b"tR"].concat();
    [&b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01(K\x00M\x00\x0ct"[..], &dtype, b"\x89C\x00tb"].concat()
}

#[test]
fn pickles_of_cifar() -> Result<()> {
    let dir = TempDir::new()?;
    let folder = dir.path().join("cifar");
    fs::create_dir(&folder)?;
    for part in fs::read_dir(fixture("cifar-10-batches-py"))? {
        let path = part?.path();
        if path.is_file() {
            fs::copy(&path, folder.join(path.file_name().context("no name")?))?;
        }
    }
    let batch = |labels: &[u8]| {
        [b"}(", text("data").as_slice(), &empty_array(), &text("labels"), labels, b"u."].concat()
    };
    let latin = [&b"c_codecs\nencode\n("[..], &text("\u{100}"), &text("latin1"), b"tR."].concat();
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (b".".to_vec(), "a value is missing"),
        (b"t".to_vec(), "a mark is missing"),
        (b"NN\x93".to_vec(), "the name of a class is no text"),
        (b"NNb.".to_vec(), "state is given to something that has none"),
        (b"I1\n".to_vec(), "is not needed for arrays and labels"),
        (b"\x8a\x09123456789".to_vec(), "a number is too large"),
        (b"\x8c\x01\xff".to_vec(), "a text is not UTF-8"),
        (b"NNa".to_vec(), "a list is missing"),
        (b"NNNs".to_vec(), "a dictionary is missing"),
        (b"h\x00".to_vec(), "a value is referred to that was not kept"),
        (b"NNR".to_vec(), "a function is missing"),
        (b"c_codecs\nencode\nNR".to_vec(), "arguments are missing"),
        (b"c_codecs\nencode\n)R".to_vec(), "a text is encoded in another way than latin1"),
        (latin, "a text is not latin1"),
        (b"}.".to_vec(), "it has no entry `data`"),
        ([&b"}"[..], &text("data"), b"Ns."].concat(), "expected a numpy array of unsigned bytes in C order"),
        (batch(b"N"), "expected a list of numbers"),
        (batch(b"]K\x00a"), "labels, expected [labels, 3072]"),
    ];
    for (bytes, problem) in cases {
        fs::write(folder.join("data_batch_1"), bytes)?;
        let line = "dmd-distill classifier --data cifar --shape 3x32x32 --out c";
        says(dir.path(), line, &["not a batch of CIFAR-10's Python version: ", problem])?;
    }
    fs::remove_file(folder.join("data_batch_2"))?;
    let line = "dmd-distill classifier --data cifar --shape 3x32x32 --out c";
    says(dir.path(), line, &["it looks like CIFAR-10, but there is no `data_batch_2`"])
}

/// A zip file of these entries.
fn zip(entries: &[(&str, &[u8])]) -> Result<Vec<u8>> {
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        archive.start_file(*name, SimpleFileOptions::default())?;
        archive.write_all(bytes)?;
    }
    Ok(archive.finish()?.into_inner())
}

/// A pickled dictionary of `count` tensors, each all six numbers of the storage 0.
fn tensors(class: &str, count: usize) -> Vec<u8> {
    let storage =
        [b"(".to_vec(), text("storage"), format!("ctorch\n{class}\n").into_bytes(), text("0"), text("cpu")];
    let storage = [storage.concat().as_slice(), b"K\x06tQ"].concat();
    let tensor =
        [&b"ctorch._utils\n_rebuild_tensor_v2\n("[..], &storage, b"K\x00(K\x06t(K\x01t\x89NtR"].concat();
    let entries = (0..count).flat_map(|i| [text(&format!("w{i}")), tensor.clone()].concat());
    [b"}(".to_vec(), entries.collect(), b"u.".to_vec()].concat()
}

#[test]
fn pytorch_files() -> Result<()> {
    let dir = TempDir::new()?;
    let refuses = |bytes: Vec<u8>, texts: &[&str]| {
        fs::write(dir.path().join("x.pth"), bytes)?;
        says(dir.path(), "dmd-distill --base x.pth --dry-run", texts)
    };
    let file = |pickle: &[u8]| zip(&[("m/data.pkl", pickle), ("m/data/0", &[0; 24])]);
    for (pickle, problem) in [
        (&b"h\x00."[..], "a value that was not kept"),
        (b"0", "it takes from an empty stack"),
        (b"2", "it looks at an empty stack"),
        (b"t", "a group has no beginning"),
        (b"NNa", "it appends to what is no list"),
        (b"NNNs", "it adds to what is no dictionary"),
        (b"NN\x93", "a class without a name"),
        (b"\x8a\x09123456789", "a number of more than 64 bits"),
        (b"I", "is none that tensors need"),
    ] {
        refuses(file(pickle)?, &["without running it: damaged pickle: ", problem, "hint: convert it"])?;
    }
    refuses(file(&tensors("ComplexFloatStorage", 1))?, &["unsupported storage type ComplexFloatStorage"])?;
    refuses(file(&tensors("FloatStorage", 5))?, &["its tensors overlap"])?;
    refuses(zip(&[("readme", b"x")])?, &["there is no data.pkl in it"])?;
    refuses(zip(&[("a.pth", &zip(&[("x", b"x")])?)])?, &["there is no data.pkl in the file inside it"])?;
    refuses(zip(&[("a.pth", b"x"), ("b.pth", b"x")])?, &["it holds several models: `a.pth`, `b.pth`"])?;
    let mut crowded = zip(&[("x", b"x")])?;
    let counts = crowded.len() - 14..crowded.len() - 10; // on this disk and in all
    crowded[counts].fill(255);
    refuses(crowded, &["it announces 65535 files, more than it has room for"])
}

/// MNIST's training files with these contents.
fn idx(folder: &Path, images: &[u8], labels: &[u8]) -> Result<()> {
    fs::create_dir_all(folder)?;
    fs::write(folder.join("train-images-idx3-ubyte"), images)?;
    Ok(fs::write(folder.join("train-labels-idx1-ubyte"), labels)?)
}

#[test]
fn data_sets() -> Result<()> {
    let dir = TempDir::new()?;
    let (cwd, folder) = (dir.path(), dir.path().join("idx"));
    let header = |n: u8, side: u8| vec![0, 0, 8, 3, 0, 0, 0, n, 0, 0, 0, side, 0, 0, 0, side];
    let train = "dmd-distill teacher --base ddpm-mnist --train-steps 1 --batch 1 --out t --data";
    let refuses = |images: &[u8], labels: &[u8], problem: &str| {
        idx(&folder, images, labels)?;
        says(cwd, &format!("{train} idx"), &[problem])
    };
    refuses(
        &[&header(2, 2)[..], &[0; 4]].concat(),
        &[0, 0, 8, 1, 0, 0, 0, 2, 1, 2],
        "bytes of data for sizes",
    )?;
    refuses(b"no idx file", &[], "not an idx file: it does not start with 0, 0, 8 and the number of axes")?;
    refuses(&header(0, 2), &[0, 0, 8, 1, 0, 0, 0, 0], "the data set holds no images")?;
    fs::write(folder.join("my-train-images-idx3-ubyte"), b"x")?;
    refuses(&header(0, 2), &[], "are both there, expected one")?;
    fs::create_dir_all(cwd.join("mixed/class"))?;
    for name in ["mixed/a.png", "mixed/class/b.png"] {
        GrayImage::from_pixel(4, 4, Luma([9])).save(cwd.join(name))?;
    }
    says(
        cwd,
        &format!("{train} mixed"),
        &["there are images both directly in it and in `class/`, expected one of the two"],
    )?;
    for part in ["split/train/class", "split/test/class"] {
        fs::create_dir_all(cwd.join(part))?;
        GrayImage::from_pixel(4, 4, Luma([9])).save(cwd.join(part).join("a.png"))?;
    }
    let classifier = "dmd-distill classifier --data split --out c";
    says(cwd, &format!("{classifier} --shape 1x2"), &["expected three numbers as in 3x32x32"])?;
    says(cwd, &format!("{classifier} --shape 1x28x20"), &["images are 28x20, expected squares"])?;
    says(cwd, &format!("{classifier} --shape 1x28x28 --lr 2"), &["`--lr` must lie between 0 and 1"])?;
    for part in ["split/train/other", "split/test/other"] {
        fs::create_dir_all(cwd.join(part))?;
        GrayImage::from_pixel(4, 4, Luma([90])).save(cwd.join(part).join("b.png"))?;
    }
    let nowhere = "dmd-distill classifier --data split --shape 1x28x28 --out split/train/class/a.png/c";
    says(cwd, nowhere, &["cannot create `split/train/class/a.png/c`"])?;
    let problem = ["got `--batch 64`, expected at most the 2 training images of `split`"];
    says(cwd, &format!("{classifier} --shape 1x28x28"), &problem)
}

#[test]
fn options_of_distill() -> Result<()> {
    let dir = TempDir::new()?;
    let cwd = dir.path();
    run(cwd)?;
    says(
        cwd,
        "dmd-distill pairs --base ./base --count 8 --steps 0",
        &["`--count` must be at least 1 and `--steps` from 1 to 1000"],
    )?;
    says(cwd, "dmd-distill sample ./base --count 0", &["`--count` must be at least 1"])?;
    says(cwd, "dmd-distill sample ./base -o s.jpg", &["s.jpg", "the name of a picture must end in `.png`"])?;
    says(
        cwd,
        "dmd-distill --base ./base --config fast",
        &["there is no such file", "hint: built-in recipes are"],
    )?;
    says(
        cwd,
        "dmd-distill --base ./base --t-gen 1000",
        &["got `--t-gen 1000`, expected `auto`, `last` or 0 to 999"],
    )?;
    says(cwd, "dmd-distill pairs --base ./base --shard 2/2", &["expected I/N with I from 0 to N - 1"])?;
    says(
        cwd,
        "dmd-distill --base ./base --train-steps 1 --pairs 2 --pairs-dir p --out nowhere/..",
        &["it is no name of a folder"],
    )?;
    let none = "dmd-distill eval run --teacher none --shard 0/2 --count 70";
    says(cwd, none, &["`--shard` draws the images of a teacher, and there is none"])?;
    let pairs = "pairs --base ./base --count 300 --steps 1 --out p";
    let done = run_bin("dmd-distill", cwd, pairs.split_whitespace())?;
    ensure!(done.code == Some(0), "{done:?}");
    fs::copy(cwd.join("p/shard-00000.safetensors"), cwd.join("p/shard-00001.safetensors"))?;
    let hint = "delete the one that was copied: the same command computes it";
    says(cwd, &format!("dmd-distill {pairs}"), &["it holds the images of shard 0", hint])?;
    let state = cwd.join("run/checkpoints/state.safetensors");
    let saved = fs::read(&state)?;
    fs::copy(cwd.join("base").join(WEIGHTS), &state)?;
    says(cwd, "dmd-distill --resume run", &["state.safetensors", "it is no state of a run"])?;
    let header = br#"{"__metadata__":{"state":"{}"}}"#;
    fs::write(&state, [&(header.len() as u64).to_le_bytes()[..], header].concat())?;
    says(cwd, "dmd-distill --resume run", &["state.safetensors", "it does not say its step"])?;
    fs::remove_file(&state)?;
    let second = "dmd-distill --base ./base --out b --init run --pairs-dir pairs --pairs 2 --pair-steps 2";
    says(cwd, second, &["the run has saved no state yet"])?;
    fs::write(&state, saved)?;
    set(&cwd.join("run/run.json"), "command", json!("dream"))?;
    says(cwd, "dmd-distill --resume run", &["got another `command`, expected `distill` or `teacher`"])
}

#[test]
fn scores() -> Result<()> {
    let dir = TempDir::new()?;
    let cwd = dir.path();
    let array = |version: u8, header: &str, values: &[u8]| -> Result<()> {
        let start = [&b"\x93NUMPY"[..], &[version, 0], &(header.len() as u16).to_le_bytes()].concat();
        Ok(fs::write(cwd.join("x.npy"), [&start, header.as_bytes(), values].concat())?)
    };
    let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 1, 28, 28), }\n";
    let hint = "hint: `dmd-run MODEL --count N -o FILE.npy` writes such files; in NumPy, `x.astype('<f4')`";
    let eval = "dmd-distill eval --images x.npy --count 70";
    array(9, header, &[])?;
    says(cwd, eval, &["its header is of an unknown version", hint])?;
    array(1, &header.replace("<f4", "<f8"), &[])?;
    says(cwd, eval, &["it holds values of type `<f8`, expected `<f4`", hint])?;
    array(1, header, &[0; 8])?;
    says(cwd, eval, &["got 8 bytes of values for the shape [2, 1, 28, 28]", hint])?;
    says(cwd, &format!("{eval} --range 1"), &["got `--range 1`, expected two numbers: lower,upper"])
}

#[test]
fn exports() -> Result<()> {
    let dir = TempDir::new()?;
    let cwd = dir.path();
    base(cwd)?;
    let export = "dmd-export m.onnx --teacher --from";
    says(cwd, &format!("{export} base/config.json"), &["it is a file, expected a directory"])?;
    says(cwd, &format!("{export} nowhere"), &["cannot read `nowhere`: no such directory"])?;
    let path = cwd.join("base").join(WEIGHTS);
    let bytes = fs::read(&path)?;
    let mut nan = bytes.clone();
    let last = nan.len() - 4;
    nan[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, nan)?;
    says(cwd, &format!("{export} base"), &["got NaN at element ", ", expected finite numbers"])?;
    let typed = String::from_utf8_lossy(&bytes[8..600]).replacen("\"F32\"", "\"I32\"", 1);
    fs::write(&path, [&bytes[..8], typed.as_bytes(), &bytes[600..]].concat())?;
    says(cwd, &format!("{export} base"), &["got type I32, expected F32, F16 or BF16"])
}

#[test]
fn model_files() -> Result<()> {
    let dir = TempDir::new()?;
    let dims = ["n", "1", "4", "4"];
    let refuses = |bytes: Vec<u8>, problem: &str| {
        fs::write(dir.path().join("x.onnx"), bytes)?;
        says(dir.path(), "dmd-run info x.onnx", &["cannot use `x.onnx`: ", problem])
    };
    let card = |key: &str, value: Value| {
        let mut card = card_json("generator", 4);
        card[key] = value;
        identity(&dims, "x_gen", DataType::Float, Some(card.to_string()))
    };
    let image =
        |height: u32, range: [f32; 2]| json!({ "channels": 1, "height": height, "width": 4, "range": range });
    refuses(card("image", image(0, [-1.0, 1.0])), "model card: got image 1x0x4")?;
    refuses(card("image", image(4, [1.0, -1.0])), ", expected lower then upper")?;
    refuses(card("noise", json!("mine")), "got noise contract `mine`, expected `dmd-noise-1`")?;
    refuses(card("classes", json!({ "count": 3 })), "and the classes of the model card disagree")?;
    refuses(identity(&dims, "x_gen", DataType::Float, Some("{".into())), "model card: not JSON: ")?;
    refuses(
        identity(&dims, "y", DataType::Float, Some(card_json("generator", 4).to_string())),
        "got outputs `y` f32 [n, 1, 4, 4], expected `x_gen`",
    )?;
    let graph =
        |inputs, outputs| model((inputs, outputs), vec![node("Identity", &["z"], "y")], Vec::new(), None);
    let float = |name: &str, dims: &[&str]| port(name, dims, DataType::Float);
    let mut no_tensor = float("z", &dims);
    no_tensor.r#type = None;
    refuses(graph(vec![no_tensor], vec![float("y", &dims)]), "`z` is not a tensor")?;
    let class = port("class", &["2"], DataType::Int64);
    let two = vec![float("z", &["3", "1", "4", "4"]), class];
    refuses(graph(two, vec![float("y", &dims)]), ", expected one number of images for all of them")?;
    refuses(graph(vec![], vec![float("y", &dims)]), "got inputs none, expected one f32 [n, c, h, w]")?;
    let wide = vec![float("y", &["n", "1", "4", "8"])];
    refuses(
        graph(vec![float("z", &dims)], wide),
        "got output `y` f32 [n, 1, 4, 8], expected f32 [n, 1, 4, 4] as the input ",
    )?;
    let unknown = model(
        (vec![float("z", &dims)], vec![float("y", &dims)]),
        vec![node("NoSuchOperator", &["z"], "y")],
        Vec::new(),
        None,
    );
    fs::write(dir.path().join("x.onnx"), unknown)?;
    says(dir.path(), "dmd-run x.onnx --provider tract", &["tract cannot run `x.onnx`: "])
}

#[test]
fn requests_to_run() -> Result<()> {
    let dir = TempDir::new()?;
    let cwd = dir.path();
    fs::create_dir(cwd.join("folder.png"))?;
    fs::write(cwd.join("plain.onnx"), identity(&["n", "1", "4", "4"], "y", DataType::Float, None))?;
    says(cwd, "dmd-run --grid -o x.npy", &["got --grid with `x.npy`, which holds no sheet"])?;
    says(
        cwd,
        "dmd-run -o folder.png",
        &["`folder.png` is a directory or a device, expected a file to write"],
    )?;
    if cfg!(unix) {
        let device = "dmd-run -o x.png --report /dev/null --force";
        says(cwd, device, &["`/dev/null` is a directory or a device, expected a file to write"])?;
    }
    says(
        cwd,
        "dmd-run plain.onnx --class all",
        &["got --class all, but ", " does not say which classes it has"],
    )?;
    says(cwd, "dmd-run --seed 0..4294967295", &[" seeds; --count draws many images of one seed"])?;
    models::teacher(cwd)?;
    says(
        cwd,
        "dmd-run teacher.onnx --steps 1001",
        &["got 1001 steps, expected 1 to 1000 from the model card"],
    )?;
    if cfg!(target_pointer_width = "64") {
        says(cwd, "dmd-run --provider cpu --ort-lib plain.onnx", &["plain.onnx` cannot be loaded: "])?;
    }
    Ok(())
}

#[test]
fn golden_files() -> Result<()> {
    let dir = TempDir::new()?;
    let cwd = dir.path();
    fs::create_dir(cwd.join("runs"))?;
    let from = repository().join("assets/one-step-fashion");
    let out = run_bin("dmd-export", cwd, ["m.onnx", "--golden", "--from", from.to_str().context("path")?])?;
    ensure!(out.code == Some(0), "{out:?}");
    let path = cwd.join("m.golden.safetensors");
    let bytes = fs::read(&path)?;
    let changed = |from: &str, to: &str| -> Result<()> {
        let length = u64::from_le_bytes(bytes[..8].try_into()?) as usize;
        let header = String::from_utf8(bytes[8..8 + length].to_vec())?;
        ensure!(header.contains(from) && from.len() == to.len(), "{header}");
        let header = header.replacen(from, to, 1);
        Ok(fs::write(&path, [&bytes[..8], header.as_bytes(), &bytes[8 + length..]].concat())?)
    };
    changed("dmd-noise-1", "dmd-noise-9")?;
    says(cwd, "dmd-run verify m.onnx", &["got `noise` dmd-noise-9, expected dmd-noise-1"])?;
    changed("[8,1,28,28]", "[8,1,56,14]")?;
    says(cwd, "dmd-run verify m.onnx", &["`x_gen` is F32 [8, 1, 56, 14], expected F32 [8, 1, 28, 28]"])
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_with_130_and_says_how_to_go_on() -> Result<()> {
    let dir = TempDir::new()?;
    let cwd = dir.path();
    base(cwd)?;
    let run = "--base ./base --out run --train-steps 1000000 --batch 1 --pairs 1 --pair-steps 1 --fake-updates 1 --samples 1 \
               --sample-every 1000000 --eval-count 0";
    let teacher = "teacher --base ddpm-fashion --data fashion-mnist --out t --train-steps 1000000 --batch 1";
    for (line, folder, hint) in [
        (run, "run", "dmd-distill --resume run"),
        (teacher, "t", "continue with `dmd-distill teacher --resume t`"),
    ] {
        let log = cwd.join(folder).join("stats.jsonl");
        let done = interrupt_distill(cwd, line.split_whitespace(), || log.exists())?;
        ensure!(done.code == Some(130), "{done:?}");
        ensure!(done.stderr.contains("stopped after step ") && done.stderr.contains(hint), "{done:?}");
    }
    Ok(())
}
