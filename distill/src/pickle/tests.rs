//! Files as PyTorch writes them, and as nobody should.

use std::io::Write;

use zip::write::SimpleFileOptions;

use super::*;

/// A zip file of these entries.
fn archive(entries: &[(&str, &[u8])], method: zip::CompressionMethod) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        archive.start_file(*name, SimpleFileOptions::default().compression_method(method)).unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

/// A PyTorch file with this pickle and the storage 0, 1, …, 5.
fn file(pickle: &[u8]) -> Vec<u8> {
    let storage: Vec<u8> = (0..6u8).flat_map(|v| f32::from(v).to_le_bytes()).collect();
    archive(&[("m/data.pkl", pickle), ("m/data/0", &storage)], zip::CompressionMethod::Stored)
}

fn global(module: &str, name: &str) -> Vec<u8> {
    format!("c{module}\n{name}\n").into_bytes()
}

fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

fn tuple(items: &[&[u8]]) -> Vec<u8> {
    [b"(", items.concat().as_slice(), b"t"].concat()
}

fn numbers(all: &[u8]) -> Vec<u8> {
    tuple(&all.iter().map(|n| [b'K', *n]).collect::<Vec<_>>().iter().map(|n| &n[..]).collect::<Vec<_>>())
}

fn call(function: &[u8], arguments: &[u8]) -> Vec<u8> {
    [function, arguments, b"R"].concat()
}

fn storage() -> Vec<u8> {
    let id = [text("storage"), global("torch", "FloatStorage"), text("0"), text("cpu"), vec![b'K', 6]];
    [tuple(&id.iter().map(Vec::as_slice).collect::<Vec<_>>()), b"Q".to_vec()].concat()
}

fn tensor(offset: u8, size: &[u8], stride: &[u8]) -> Vec<u8> {
    let arguments = [storage(), vec![b'K', offset], numbers(size), numbers(stride), b"\x89N".to_vec()];
    let arguments = tuple(&arguments.iter().map(Vec::as_slice).collect::<Vec<_>>());
    call(&global("torch._utils", "_rebuild_tensor_v2"), &arguments)
}

/// A pickled dictionary with one entry.
fn dict(value: &[u8]) -> Vec<u8> {
    [b"\x80\x02}", text("w").as_slice(), value, b"s."].concat()
}

fn problem(pickle: &[u8]) -> String {
    match read(&file(pickle)) {
        Err(Problem::Broken(problem) | Problem::Foreign(problem)) => problem,
        Ok(found) => panic!("read {:?}", found.keys()),
    }
}

#[test]
fn tensors_are_found_where_training_programs_put_them() {
    let values = |pickle: &[u8]| {
        let found = read(&file(pickle)).unwrap();
        (found["w"].dims().to_vec(), found["w"].flatten_all().unwrap().to_vec1::<f32>().unwrap())
    };
    let plain = tensor(1, &[2, 2], &[2, 1]);
    let expected = (vec![2, 2], vec![1.0, 2.0, 3.0, 4.0]);
    assert_eq!(values(&dict(&plain)), expected);
    assert_eq!(values(&dict(&tensor(0, &[3, 2], &[1, 3]))), (vec![3, 2], vec![0.0, 3.0, 1.0, 4.0, 2.0, 5.0]));
    assert_eq!(values(&dict(&tensor(5, &[], &[]))), (vec![], vec![5.0]));
    let parameter = call(&global("torch._utils", "_rebuild_parameter"), &tuple(&[&plain, b"\x88", b"N"]));
    assert_eq!(values(&dict(&parameter)), expected);
    let rebuild = global("torch._utils", "_rebuild_tensor_v2");
    let arguments = &plain[rebuild.len()..plain.len() - 1];
    let typed = tuple(&[&rebuild, &global("torch", "Tensor"), arguments, b"}"]);
    assert_eq!(values(&dict(&call(&global("torch._tensor", "_rebuild_from_type_v2"), &typed))), expected);
    let state = [b"\x80\x02}", text("epoch").as_slice(), b"K\x03s", text("model").as_slice(), b"}"].concat();
    let state = [state.as_slice(), &text("w"), &plain, b"ss."].concat();
    assert_eq!(values(&state), expected);
}

#[test]
fn one_model_in_a_zip_file_is_found() {
    let inner = file(&dict(&tensor(0, &[6], &[1])));
    let zip = |entries: &[(&str, &[u8])]| archive(entries, zip::CompressionMethod::Deflated);
    let found = read(&zip(&[("README.md", b"x"), ("__MACOSX/._m.pth", b"x"), ("m/m.pth", &inner)])).unwrap();
    assert_eq!(found["w"].dims(), [6]);
    for entries in [&[("a.pth", inner.as_slice()), ("b.pth", &inner)][..], &[("README.md", b"x")], &[]] {
        assert!(read(&zip(entries)).is_err());
    }
    assert!(read(&zip(&[("m.zip.pth", &zip(&[("m.pth", &inner)]))])).is_err(), "two zip files deep");
}

/// Short arguments made candle's reader panic.
#[test]
fn a_malformed_tensor_is_refused_by_name() {
    let call = |module: &str, name: &str, arguments: &[&[u8]]| {
        problem(&dict(&call(&global(module, name), &tuple(arguments))))
    };
    let rebuild = global("torch._utils", "_rebuild_tensor_v2");
    for message in [
        call("torch._utils", "_rebuild_parameter", &[]),
        call("torch._tensor", "_rebuild_from_type_v2", &[]),
        call("torch._tensor", "_rebuild_from_type_v2", &[&rebuild, b"N"]),
        call("torch._tensor", "_rebuild_from_type_v2", &[&rebuild, b"N", b"N"]),
        call("torch._utils", "_rebuild_tensor_v2", &[]),
        call("torch._utils", "_rebuild_tensor_v2", &[&storage(), b"K\x00", &numbers(&[2])]),
        call("torch._utils", "_rebuild_tensor_v2", &[b")Q", b"K\x00", &numbers(&[2]), &numbers(&[1])]),
        problem(&dict(&tensor(0, &[2, 3], &[1]))),
        problem(&dict(&tensor(1, &[6], &[1]))),
        problem(&dict(&tensor(0, &[255, 255, 255, 255], &[255, 255, 255, 255]))),
        problem(&dict(&tensor(0, &[7], &[0]))),
    ] {
        assert!(message.contains("tensor `w`"), "{message}");
    }
    let foreign = problem(&dict(&super::tests::call(&global("os", "system"), &tuple(&[&text("ls")]))));
    assert_eq!(foreign, "os.system");
}

#[test]
fn neither_depth_nor_repetition_nor_damage_does_harm() {
    let deep = [&b"\x80\x02)"[..], &vec![0x85; 2_000_000], b"."].concat();
    assert!(problem(&deep).contains("no tensors"));
    let mut wide = b"\x80\x02]q\x00".to_vec();
    for _ in 0..200 {
        wide.extend(b"h\x00h\x00\x86q\x00");
    }
    wide.push(b'.');
    assert!(problem(&wide).contains("no tensors"));
    let itself = b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.";
    assert!(problem(itself).contains("no tensors"));
    let long = [b"\x80\x02X".as_slice(), &u32::MAX.to_le_bytes(), b"x."].concat();
    assert!(problem(&long).contains("cut short"));
    let good = dict(&tensor(0, &[6], &[1]));
    for end in 0..good.len() {
        problem(&good[..end]);
    }
    for at in 0..good.len() {
        for value in [0, 1, b'(', b')', b't', b'R', b'Q', b'u', b'.', 0x85, 0xff] {
            let mut changed = good.clone();
            changed[at] = value;
            let _ = read(&file(&changed));
        }
    }
}

/// Bytes that each make a value of fifty, in a file that packs them to nothing, and storages of zeros that do the same.
#[test]
fn what_unpacks_to_far_more_than_its_file_is_refused() {
    let deflated = |entries: &[(&str, &[u8])]| archive(entries, zip::CompressionMethod::Deflated);
    let pickle = dict(&tensor(0, &[6], &[1]));
    let fits = deflated(&[("m/data.pkl", &pickle), ("m/data/0", &[0; 24])]);
    assert_eq!(read(&fits).unwrap()["w"].dims(), [6]);
    let zeros = vec![0; 4 << 20];
    for bomb in [
        deflated(&[("m/data.pkl", &pickle), ("m/data/0", &zeros)]),
        deflated(&[("m.pth", &archive(&[("m/data.pkl", &zeros)], zip::CompressionMethod::Stored))]),
    ] {
        let Err(Problem::Broken(problem)) = read(&bomb) else { panic!("a bomb was unpacked") };
        assert!(problem.contains("unpacks to more than"), "{problem}");
    }
    let values = [b"\x80\x02".to_vec(), vec![b'N'; 3 << 20], b".".to_vec()].concat();
    let Err(Problem::Broken(problem)) = read(&file(&values)) else { panic!("all values were kept") };
    assert!(problem.contains("more than 2097152 values"), "{problem}");
    let kept = [b"\x80\x02N".to_vec(), vec![0x94; 3 << 20], b".".to_vec()].concat();
    assert!(matches!(read(&file(&kept)), Err(Problem::Broken(_))));
}

/// A long name that many entries share by reference costs time for each of them.
#[test]
fn names_and_keys_are_short() {
    let long = "n".repeat(1 << 20);
    let named = [b"\x80\x02}", text(&long).as_slice(), &tensor(0, &[6], &[1]), b"s."].concat();
    assert!(matches!(read(&file(&named)), Err(Problem::Broken(_))), "a name of a megabyte");
    let class = [b"\x80\x02", global("torch", &long).as_slice(), b"."].concat();
    let Err(Problem::Broken(problem)) = read(&file(&class)) else { panic!("a class of a megabyte") };
    assert!(problem.contains("name without end"), "{problem}");
}

/// `ZipArchive` would reserve memory for all of them.
#[test]
fn more_files_than_have_room_are_refused_by_every_end_record() {
    let good = file(&dict(&tensor(0, &[6], &[1])));
    let end = good.len() - 22;
    let with_count = |record: &[u8], count: u16| {
        let mut record = record.to_vec();
        record[8..10].copy_from_slice(&count.to_le_bytes());
        record[10..12].copy_from_slice(&count.to_le_bytes());
        record
    };
    let entries = &good[..end];
    let record = &good[end..];
    let locator = [b"PK\x06\x07\0\0\0\0".as_slice(), &(end as u64).to_le_bytes(), &[1, 0, 0, 0]].concat();
    let zip64 = {
        let at = |range: std::ops::Range<usize>| u32::from_le_bytes(record[range].try_into().unwrap());
        let fixed = [b"PK\x06\x06".as_slice(), &44u64.to_le_bytes(), &[45, 0, 45, 0], &[0; 8]].concat();
        let numbers = [2, 2, u64::from(at(12..16)), u64::from(at(16..20))].map(u64::to_le_bytes);
        [fixed, numbers.concat()].concat()
    };
    for accepted in [
        [entries, &zip64, &locator, &with_count(record, u16::MAX)].concat(),
        [entries, &with_count(record, 2)].concat(),
    ] {
        assert_eq!(read(&accepted).unwrap()["w"].dims(), [6]);
    }
    for refused in [
        [entries, &with_count(record, u16::MAX)].concat(),
        [entries, &with_count(record, good.len() as u16 / 46 + 1)].concat(),
        [entries, &zip64, &locator, &with_count(record, u16::MAX - 1)].concat(),
        [entries, &with_count(record, u16::MAX), &with_count(record, 2)].concat(),
        [entries, &with_count(record, u16::MAX), &[0; 1 << 16]].concat(),
    ] {
        let Err(Problem::Broken(problem)) = read(&refused) else { panic!("a file without room was read") };
        assert!(problem.contains("more than it has room for"), "{problem}");
    }
    let mut many = zip64;
    many[24..32].copy_from_slice(&(1u64 << 40).to_le_bytes());
    many[32..40].copy_from_slice(&(1u64 << 40).to_le_bytes());
    let many = [entries, &many, &locator, &with_count(record, u16::MAX)].concat();
    assert!(matches!(read(&many), Err(Problem::Broken(_))), "2^40 files, said by a zip64 record");
}
