//! The native runtime for C; `include/dmd.h` is written from this file by cbindgen.
//! Nothing is computed here: arguments are checked, panics stop at the border, and errors become codes and a text.
#![expect(unsafe_code, reason = "a C interface takes pointers")]

mod border;

use std::ffi::{CString, c_char};
use std::path::Path;

use dmd_runtime_native::{Class, Generator, Images, ModelFile, ModelInfo, Options, Provider, Request};
use serde::Serialize;

use border::{Failure, Room, guarded, optional, reference, required};

/// What a function returns.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmdStatus {
    /// It did what it says.
    Ok = 0,
    /// A pointer is null.
    NullPointer = 1,
    /// A text is not UTF-8, or names nothing.
    InvalidText = 2,
    /// A buffer is too small for what was asked.
    BufferTooSmall = 3,
    /// The file cannot be read, or is no model.
    InvalidModel = 4,
    /// The model does not have what was asked for: a class, a number of images.
    InvalidRequest = 5,
    /// The provider asked for cannot be had here.
    ProviderUnavailable = 6,
    /// The engine failed.
    EngineFailed = 7,
    /// A bug of this library.
    InternalError = 8,
}

/// `class_id` for images of every class in turn: image `k` has class `k` modulo their number. Also for models without.
pub const DMD_CLASS_CYCLE: i64 = -1;

/// A model, ready to generate.
pub struct DmdGenerator {
    generator: Generator,
    info: CString,
}

/// What [`dmd_info`] says.
#[derive(Serialize)]
struct Info<'a> {
    #[serde(flatten)]
    model: &'a ModelInfo,
    provider: Provider,
    engine: &'a str,
}

/// Opens the ONNX file `path`. `*generator` is null unless the status is `DMD_STATUS_OK`; `dmd_close` frees it.
///
/// `provider` is `auto`, `engine`, `cpu`, `cuda` or another that `dmd-run providers` lists; null is `auto`. `threads` is 0
/// for one per core. `ort_lib` is the onnxruntime library to load; null searches for it as `dmd-run` does.
///
/// # Safety
/// Texts are null or end in a zero byte; `generator` is null or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmd_open(
    path: *const c_char,
    provider: *const c_char,
    threads: usize,
    ort_lib: *const c_char,
    generator: *mut *mut DmdGenerator,
) -> DmdStatus {
    guarded(|| {
        // SAFETY: as the caller promised.
        let (out, path) = unsafe { (border::output(generator)?, required("path", path)?) };
        // SAFETY: as the caller promised.
        let options = unsafe { options(provider, threads, ort_lib)? };
        *out = open(ModelFile::read(Path::new(path))?, &options)?;
        Ok(())
    })
}

/// Opens an ONNX model of `len` bytes in memory, which are copied. For the rest see `dmd_open`.
///
/// # Safety
/// `bytes` is null or has `len` bytes; for the rest see [`dmd_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmd_open_memory(
    bytes: *const u8,
    len: usize,
    provider: *const c_char,
    threads: usize,
    ort_lib: *const c_char,
    generator: *mut *mut DmdGenerator,
) -> DmdStatus {
    guarded(|| {
        // SAFETY: as the caller promised.
        let (out, bytes) = unsafe { (border::output(generator)?, border::bytes("bytes", bytes, len)?) };
        // SAFETY: as the caller promised.
        let options = unsafe { options(provider, threads, ort_lib)? };
        *out = open(ModelFile::parse("the model in memory", bytes.to_vec())?, &options)?;
        Ok(())
    })
}

/// What the model and its card say, and what runs it: JSON as of `dmd-run info --json`, with `provider` and `engine`.
/// The text lives as long as the generator; null for a null generator.
///
/// # Safety
/// `generator` is null or open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmd_info(generator: *const DmdGenerator) -> *const c_char {
    // SAFETY: as the caller promised.
    unsafe { generator.as_ref() }.map_or(std::ptr::null(), |g| g.info.as_ptr())
}

/// Writes channels, rows and columns of an image to `shape`.
///
/// # Safety
/// `generator` is null or open; `shape` is null or has room for three numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmd_shape(generator: *const DmdGenerator, shape: *mut usize) -> DmdStatus {
    guarded(|| {
        // SAFETY: as the caller promised.
        let generator = &unsafe { reference(generator)? }.generator;
        let room = Room::check("shape", shape, 3, 3)?;
        // SAFETY: as the caller promised.
        unsafe { room.fill(&generator.info().image_shape()) };
        Ok(())
    })
}

/// Generates the images `first .. first + count` of a seed as bytes: image after image, row after row, channel fastest.
/// Image `k` of a seed is always the same. `len` is the size of `pixels`, at least `count` * channels * rows * columns.
///
/// # Safety
/// `generator` is null or open; `pixels` is null or has room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmd_generate_pixels(
    generator: *const DmdGenerator,
    seed: u32,
    first: u64,
    count: usize,
    class_id: i64,
    pixels: *mut u8,
    len: usize,
) -> DmdStatus {
    guarded(|| {
        // SAFETY: as the caller promised.
        let generator = &unsafe { reference(generator)? }.generator;
        let room = Room::check("pixels", pixels, len, needed(generator, count)?)?;
        let images = generate(generator, seed, first, count, class_id)?.pixels();
        let bytes: Vec<u8> = images.into_iter().flat_map(|image| image.data).collect();
        // SAFETY: as the caller promised.
        unsafe { room.fill(&bytes) };
        Ok(())
    })
}

/// Generates the same images as numbers in the model's range: `[count, channels, rows, columns]`, columns fastest. `len` is the
/// size of `values` in numbers.
///
/// # Safety
/// `generator` is null or open; `values` is null or has room for `len` numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmd_generate_values(
    generator: *const DmdGenerator,
    seed: u32,
    first: u64,
    count: usize,
    class_id: i64,
    values: *mut f32,
    len: usize,
) -> DmdStatus {
    guarded(|| {
        // SAFETY: as the caller promised.
        let generator = &unsafe { reference(generator)? }.generator;
        let room = Room::check("values", values, len, needed(generator, count)?)?;
        let images = generate(generator, seed, first, count, class_id)?;
        // SAFETY: as the caller promised.
        unsafe { room.fill(&images.values) };
        Ok(())
    })
}

/// Why the last function that failed in this thread did. The text lives until the next one fails in this thread.
#[unsafe(no_mangle)]
pub extern "C" fn dmd_last_error() -> *const c_char {
    border::last_error()
}

/// Frees a generator that no other thread uses any more. Null is fine.
///
/// # Safety
/// `generator` is null or open, and not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmd_close(generator: *mut DmdGenerator) {
    if !generator.is_null() {
        guarded(|| {
            // SAFETY: `open` made it by `Box::into_raw`, and the caller closes it once.
            drop(unsafe { Box::from_raw(generator) });
            Ok(())
        });
    }
}

/// # Safety
/// Texts are null or end in a zero byte.
unsafe fn options(
    provider: *const c_char,
    threads: usize,
    ort_lib: *const c_char,
) -> Result<Options, Failure> {
    // SAFETY: as the caller promised.
    let (provider, ort_lib) = unsafe { (optional("provider", provider)?, optional("ort_lib", ort_lib)?) };
    let provider = provider.unwrap_or("auto").parse();
    Ok(Options {
        provider: provider.map_err(|e| Failure::new(DmdStatus::InvalidText, format!("{e}")))?,
        threads: (threads > 0).then_some(threads),
        ort_lib: ort_lib.map(Into::into),
        ..Options::default()
    })
}

fn open(file: ModelFile, options: &Options) -> Result<*mut DmdGenerator, Failure> {
    let generator = Generator::load(file, options)?;
    let choice = generator.choice();
    let info = Info { model: generator.info(), provider: choice.provider, engine: &choice.engine };
    let internal = |e: String| Failure::new(DmdStatus::InternalError, e);
    let info = serde_json::to_string(&info).map_err(|e| internal(e.to_string()))?;
    let info = CString::new(info).map_err(|e| internal(e.to_string()))?;
    Ok(Box::into_raw(Box::new(DmdGenerator { generator, info })))
}

fn needed(generator: &Generator, count: usize) -> Result<usize, Failure> {
    let too_many =
        || Failure::new(DmdStatus::InvalidRequest, format!("got {count} images, which fit nowhere"));
    count.checked_mul(generator.info().image_len()).ok_or_else(too_many)
}

fn generate(
    generator: &Generator,
    seed: u32,
    first: u64,
    count: usize,
    class_id: i64,
) -> Result<Images, Failure> {
    let class = match usize::try_from(class_id) {
        Ok(class) => Class::One(class),
        Err(_) if class_id == DMD_CLASS_CYCLE => Class::Cycle,
        Err(_) => {
            let problem = format!("got class {class_id}, expected a class or -1 for all in turn");
            return Err(Failure::new(DmdStatus::InvalidRequest, problem));
        }
    };
    Ok(generator.sample(&Request { first, class, ..Request::new(seed, count) }, &|_| {})?)
}
