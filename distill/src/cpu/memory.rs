//! Memory of the engine: aligned to cache lines, and recycled, because fresh memory costs as much as a kernel.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Free memory by size. Training asks for the same sizes in every step, so it holds no more than a step needs.
static FREE: Mutex<BTreeMap<usize, Vec<Vec<Line>>>> = Mutex::new(BTreeMap::new());

/// Floats that start at a cache line.
pub struct Buffer {
    lines: Vec<Line>,
    len: usize,
}

impl Buffer {
    /// `len` floats with any finished computation's values in them: the caller writes all of them.
    pub fn stale(len: usize) -> Self {
        let count = len.div_ceil(16);
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        let recycled = free.get_mut(&count).and_then(Vec::pop);
        drop(free);
        Self { lines: recycled.unwrap_or_else(|| vec![Line([0.0; 16]); count]), len }
    }

    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        let mut buffer = Self::stale(len);
        buffer.fill(0.0);
        buffer
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        free.entry(lines.len()).or_default().push(lines);
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_and_used_again() {
        let size = 12_345;
        let mut first = Buffer::zeros(size);
        first[size - 1] = 7.0;
        let address = first.as_ptr();
        assert_eq!((address as usize % 64, first.len()), (0, size));
        drop(first);
        let second = Buffer::stale(size);
        assert_eq!(second.as_ptr(), address);
        drop(second);
        assert!(Buffer::zeros(size).iter().all(|v| *v == 0.0));
    }
}
