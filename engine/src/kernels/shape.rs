//! Moving values: transposition, concatenation, slices, lookups, enlarging, pooling.

use super::gemm::MOVING;
use crate::parallel;

/// Transposes: axis `i` of the output is axis `order[i]` of `x`.
pub fn transpose(x: &[f32], shape: &[usize], order: &[usize], out: &mut [f32]) {
    let strides: Vec<usize> = (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect();
    let sizes: Vec<usize> = order.iter().map(|&i| shape[i]).collect();
    let steps: Vec<usize> = order.iter().map(|&i| strides[i]).collect();
    let (Some(&width), Some(&step)) = (sizes.last(), steps.last()) else {
        return out.copy_from_slice(x);
    };
    let (rows, parts) = (out.len() / width, parallel::parts(MOVING * out.len()));
    let each = rows.div_ceil(parts);
    parallel::each(parts, out.chunks_mut(each * width).enumerate(), |(part, out)| {
        let mut index = vec![0; sizes.len() - 1];
        let mut row = part * each;
        for (i, size) in index.iter_mut().zip(&sizes).rev() {
            (*i, row) = (row % size, row / size);
        }
        for row in out.chunks_exact_mut(width) {
            let start: usize = index.iter().zip(&steps).map(|(i, s)| i * s).sum();
            row.iter_mut().zip(x[start..].iter().step_by(step)).for_each(|(to, from)| *to = *from);
            for (i, size) in index.iter_mut().zip(&sizes).rev() {
                *i += 1;
                if *i < *size {
                    break;
                }
                *i = 0;
            }
        }
    });
}

/// Concatenates: of each operand `width` values in turn.
pub fn concat(parts: &[(&[f32], usize)], out: &mut [f32]) {
    let total: usize = parts.iter().map(|(_, width)| width).sum();
    for (i, row) in out.chunks_exact_mut(total).enumerate() {
        let mut at = 0;
        for (part, width) in parts {
            row[at..at + width].copy_from_slice(&part[i * width..(i + 1) * width]);
            at += width;
        }
    }
}

/// Of every block of `block` values those from `first` on, as many as fill `out`.
pub fn slice(x: &[f32], block: usize, first: usize, count: usize, out: &mut [f32]) {
    for (out, x) in out.chunks_exact_mut(count).zip(x.chunks_exact(block)) {
        out.copy_from_slice(&x[first..first + count]);
    }
}

/// Enlarges images `[.., h, w]` by repeating rows and columns.
pub fn enlarge(x: &[f32], width: usize, [down, across]: [usize; 2], out: &mut [f32]) {
    let wide = width * across;
    for (x, rows) in x.chunks_exact(width).zip(out.chunks_exact_mut(wide * down)) {
        let (first, rest) = rows.split_at_mut(wide);
        for (to, x) in first.chunks_exact_mut(across).zip(x) {
            to.fill(*x);
        }
        for row in rest.chunks_exact_mut(wide) {
            row.copy_from_slice(first);
        }
    }
}

/// A pool of images `[.., h, w]` without margin.
#[derive(Clone, Copy, Debug)]
pub struct Pool {
    /// Height and width of `x`.
    pub image: [usize; 2],
    /// Height and width of the output.
    pub places: [usize; 2],
    /// Height and width of the window.
    pub kernel: [usize; 2],
    /// Steps.
    pub stride: [usize; 2],
    /// The largest value; else the mean.
    pub max: bool,
}

/// The larger of two numbers; NaN if one of them is.
fn larger(a: f32, b: f32) -> f32 {
    if b > a || b.is_nan() { b } else { a }
}

impl Pool {
    /// Any number of images.
    pub fn run(&self, x: &[f32], out: &mut [f32]) {
        let ([h, w], [rows, columns], [kh, kw]) = (self.image, self.places, self.kernel);
        let parts = parallel::parts(MOVING * kh * kw * out.len());
        let images = x.chunks_exact(h * w).zip(out.chunks_exact_mut(rows * columns));
        parallel::each(parts, images, |(x, out)| {
            for (i, out) in out.chunks_exact_mut(columns).enumerate() {
                out.fill(if self.max { f32::NEG_INFINITY } else { 0.0 });
                for (y, left) in (0..kh).flat_map(|y| (0..kw).map(move |left| (y, left))) {
                    let x = &x[(i * self.stride[0] + y) * w + left..];
                    let step = self.stride[1];
                    match (self.max, step) {
                        (false, 1) => out.iter_mut().zip(x).for_each(|(to, x)| *to += x),
                        (false, _) => out.iter_mut().zip(x.iter().step_by(step)).for_each(|(to, x)| *to += x),
                        (true, _) => {
                            out.iter_mut()
                                .zip(x.iter().step_by(step))
                                .for_each(|(to, x)| *to = larger(*to, *x));
                        }
                    }
                }
                if !self.max {
                    out.iter_mut().for_each(|to| *to /= (kh * kw) as f32);
                }
            }
        });
    }
}

/// Repeats `x` along the axes in which `shape` has 1 and `wide` more; both have the same number of axes.
pub fn broadcast(x: &[f32], shape: &[usize], wide: &[usize], out: &mut [f32]) {
    let step = |i: usize| if shape[i] == 1 { 0 } else { shape[i + 1..].iter().product() };
    let steps: Vec<usize> = (0..shape.len()).map(step).collect();
    let mut index = vec![0; wide.len()];
    for out in out {
        *out = x[index.iter().zip(&steps).map(|(i, s)| i * s).sum::<usize>()];
        for (i, size) in index.iter_mut().zip(wide).rev() {
            *i += 1;
            if *i < *size {
                break;
            }
            *i = 0;
        }
    }
}
