//! What stands between C and the library: pointers become references or errors, errors become a code and a text of the
//! thread, panics become errors.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use dmd_runtime_native::Error;

use crate::{DmdGenerator, DmdStatus};

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// A code and its text.
pub struct Failure {
    status: DmdStatus,
    text: String,
}

impl Failure {
    pub fn new(status: DmdStatus, text: String) -> Self {
        Self { status, text }
    }

    fn null(name: &str) -> Self {
        Self::new(DmdStatus::NullPointer, format!("`{name}` is null"))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let status = match &error {
            Error::Read { .. } | Error::File { .. } => DmdStatus::InvalidModel,
            Error::Provider { .. } => DmdStatus::ProviderUnavailable,
            Error::Request(_) | Error::Core(_) => DmdStatus::InvalidRequest,
            Error::Engine { .. } => DmdStatus::EngineFailed,
            _ => DmdStatus::InternalError,
        };
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        Self { status, text }
    }
}

/// Runs what a function does; keeps the text of what went wrong.
pub fn guarded(work: impl FnOnce() -> Result<(), Failure>) -> DmdStatus {
    let failure = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => return DmdStatus::Ok,
        Ok(Err(failure)) => failure,
        Err(panic) => {
            let words = panic.downcast_ref::<String>().map(String::as_str);
            let words = words.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
            let text = format!("the library panicked, which is a bug: {words}");
            std::mem::forget(panic); // dropping it could panic again
            Failure::new(DmdStatus::InternalError, text)
        }
    };
    let text = CString::new(failure.text.replace('\0', " ")).unwrap_or_default();
    // A thread that is ending has no text any more; its code says enough.
    let _ = LAST_ERROR.try_with(|last| last.replace(text));
    failure.status
}

/// The text of the thread's last failure.
pub fn last_error() -> *const c_char {
    LAST_ERROR.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// # Safety
/// `text` is null or ends in a zero byte.
pub unsafe fn optional<'a>(name: &str, text: *const c_char) -> Result<Option<&'a str>, Failure> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: it is not null and ends in a zero byte.
    let text = unsafe { CStr::from_ptr(text) }.to_str();
    text.map(Some).map_err(|e| Failure::new(DmdStatus::InvalidText, format!("`{name}` is not UTF-8: {e}")))
}

/// # Safety
/// `text` is null or ends in a zero byte.
pub unsafe fn required<'a>(name: &str, text: *const c_char) -> Result<&'a str, Failure> {
    // SAFETY: as the caller promised.
    unsafe { optional(name, text)? }.ok_or_else(|| Failure::null(name))
}

/// # Safety
/// `generator` is null or open.
pub unsafe fn reference<'a>(generator: *const DmdGenerator) -> Result<&'a DmdGenerator, Failure> {
    // SAFETY: as the caller promised.
    unsafe { generator.as_ref() }.ok_or_else(|| Failure::null("generator"))
}

/// Where the new generator goes; it holds null until then.
///
/// # Safety
/// `generator` is null or can be written.
pub unsafe fn output<'a>(generator: *mut *mut DmdGenerator) -> Result<&'a mut *mut DmdGenerator, Failure> {
    if generator.is_null() {
        return Err(Failure::null("generator"));
    }
    // SAFETY: it is not null and can be written; what was there is not read.
    unsafe {
        generator.write(std::ptr::null_mut());
        Ok(&mut *generator)
    }
}

/// # Safety
/// `bytes` is null or has `len` bytes.
pub unsafe fn bytes<'a>(name: &str, bytes: *const u8, len: usize) -> Result<&'a [u8], Failure> {
    if bytes.is_null() {
        return Err(Failure::null(name));
    }
    if isize::try_from(len).is_err() {
        let text = format!("got {len} bytes at `{name}`, more than there can be");
        return Err(Failure::new(DmdStatus::InvalidRequest, text));
    }
    // SAFETY: it is not null and has as many bytes.
    Ok(unsafe { std::slice::from_raw_parts(bytes, len) })
}

/// A caller's buffer with room for what will be written.
pub struct Room<T> {
    at: *mut T,
    len: usize,
}

impl<T: Copy> Room<T> {
    /// # Errors
    /// If the buffer is null or has room for fewer than `needed` of its `len` values.
    pub fn check(name: &str, at: *mut T, len: usize, needed: usize) -> Result<Self, Failure> {
        if at.is_null() {
            return Err(Failure::null(name));
        }
        if len < needed {
            let text = format!("got room for {len} values in `{name}`, expected at least {needed}");
            return Err(Failure::new(DmdStatus::BufferTooSmall, text));
        }
        Ok(Self { at, len: needed })
    }

    /// # Safety
    /// The buffer is as long as its caller said.
    pub unsafe fn fill(self, values: &[T]) {
        // SAFETY: it is not null, and `len` values fit; ours lie elsewhere.
        unsafe { self.at.copy_from_nonoverlapping(values.as_ptr(), self.len.min(values.len())) }
    }
}
