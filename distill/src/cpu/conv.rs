//! Convolution and transposed convolution with their gradients.
//!
//! Both directions are one gather: an output pixel is a weighted sum of runs of consecutive input vectors. A stride
//! in the scattering direction (gradient of the input, transposed convolution) splits the output into phases that
//! each use their own kernel taps, so that no zero is ever multiplied. Sums over images are made in a fixed order,
//! whatever the number of threads.

use std::ops::Range;

use dmd_core::net::Conv2d;
use rayon::prelude::*;

use super::images::Images;
use super::memory::Buffer;
use super::simd::{add_to, lanes, vectorised};
use super::tile::{self, Grid, Matrix, Packed, Segment, Sums};

/// Groups of images per partial sum of a weight gradient.
const SUM_GROUPS: usize = 4;
/// Output channels and kernel taps whose sums a task of a weight gradient makes: they fit the second cache.
const SUM_CHANNELS: usize = 48;
const SUM_TAPS: usize = 288;

/// One run of kernel taps: the input pixels at row `dy` and columns `dx..dx + columns`, relative to the output pixel.
#[derive(Clone, Copy, Debug)]
struct Run {
    dy: isize,
    dx: isize,
    columns: usize,
}

/// The output pixels `(y, x)` with `y mod step = row` and `x mod step = column`, and what they read.
struct Phase {
    row: usize,
    column: usize,
    runs: Vec<Run>,
    weights: Packed,
}

/// A gather from images with `channels[0]` channels to images with `channels[1]`.
struct Gather {
    channels: [usize; 2],
    /// Distance of the input pixels that neighbouring output pixels of a phase read.
    stride: usize,
    /// Distance of the output pixels of a phase.
    step: usize,
    phases: Vec<Phase>,
}

/// A rectangle of the input with zeros around it.
struct Padded<'a> {
    data: Data<'a>,
    top: isize,
    left: isize,
    /// Floats per row.
    pitch: usize,
}

enum Data<'a> {
    Whole(&'a [f32]),
    Copy(Buffer),
}

impl std::ops::Deref for Data<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Self::Whole(data) => data,
            Self::Copy(buffer) => buffer,
        }
    }
}

/// Size of the output.
pub fn output_size(spec: &Conv2d, h: usize, w: usize) -> [usize; 2] {
    let [top, left, bottom, right] = spec.padding;
    let out = |size: usize| (size - spec.kernel) / spec.stride + 1;
    [out(h + top + bottom), out(w + left + right)]
}

/// `conv2d(x) + bias`; `weight` is `[out, in, kernel, kernel]`.
pub fn forward(spec: &Conv2d, x: &Images, weight: &[f32], bias: Option<&[f32]>) -> Images {
    Gather::forward(spec, weight).run(x, output_size(spec, x.h, x.w), bias)
}

/// Gradient of [`forward`] with respect to its input, which has size `[h, w]`; with a bias, the transposed convolution.
pub fn backward_input(
    spec: &Conv2d,
    gradient: &Images,
    weight: &[f32],
    size: [usize; 2],
    bias: Option<&[f32]>,
) -> Images {
    Gather::backward(spec, weight).run(gradient, size, bias)
}

/// Adds the gradient of [`forward`] with respect to its weight.
pub fn backward_weight(spec: &Conv2d, x: &Images, gradient: &Images, weight: &mut [f32]) {
    let gather = Gather::taps(spec);
    let taps = spec.kernel * spec.kernel;
    let depth = taps * spec.in_channels;
    let partial: Vec<Vec<f32>> = x
        .data
        .par_chunks(SUM_GROUPS * x.group())
        .zip(gradient.data.par_chunks(SUM_GROUPS * gradient.group()))
        .map(|(x_groups, gradients)| {
            let size = [gradient.h, gradient.w];
            let padded: Vec<Padded> = x_groups
                .chunks_exact(x.group())
                .map(|group| gather.pad(group, x, size, 0..size[0]))
                .collect();
            gather.sums(&padded, gradients, gradient)
        })
        .collect();
    for sums in partial {
        for (o, row) in sums.chunks_exact(depth).enumerate() {
            for (i, value) in row.iter().enumerate() {
                let (tap, channel) = (i / spec.in_channels, i % spec.in_channels);
                weight[(o * spec.in_channels + channel) * taps + tap] += value;
            }
        }
    }
}

/// Adds the gradient with respect to the bias: the sum of the gradient over images and pixels.
pub fn backward_bias(gradient: &Images, bias: &mut [f32]) {
    let pixel = gradient.pixel();
    let partial: Vec<Vec<f32>> = gradient
        .data
        .par_chunks(gradient.group())
        .map(|group| {
            let mut sum = vec![0.0; pixel];
            vectorised(
                #[inline(always)]
                || group.chunks_exact(pixel).for_each(|pixel| add_to(&mut sum, pixel)),
            );
            sum.chunks_exact(lanes()).map(|v| v.iter().sum()).collect()
        })
        .collect();
    partial.iter().for_each(|sum| add_to(bias, sum));
}

impl Gather {
    fn forward(spec: &Conv2d, weight: &[f32]) -> Self {
        let (k, inputs) = (spec.kernel, spec.in_channels);
        let mut gather = Self::taps(spec);
        gather.phases[0].weights = Packed::new(spec.out_channels, k * k * inputs, |o, i| {
            weight[(o * inputs + i % inputs) * k * k + i / inputs]
        });
        gather
    }

    /// The forward direction without weights.
    fn taps(spec: &Conv2d) -> Self {
        let [top, left, ..] = spec.padding;
        let run =
            |ky: usize| Run { dy: ky as isize - top as isize, dx: -(left as isize), columns: spec.kernel };
        let runs = (0..spec.kernel).map(run).collect();
        let phase = Phase { row: 0, column: 0, runs, weights: Packed::new(0, 0, |_, _| 0.0) };
        let channels = [spec.in_channels, spec.out_channels];
        Self { channels, stride: spec.stride, step: 1, phases: vec![phase] }
    }

    /// Input pixel `y` takes tap `ky` of output pixel `(y + top − ky)/stride`, where that is whole.
    fn backward(spec: &Conv2d, weight: &[f32]) -> Self {
        let (s, k, inputs, outputs) = (spec.stride, spec.kernel, spec.in_channels, spec.out_channels);
        let [top, left, ..] = spec.padding;
        // The taps of residue `at`, from the last to the first, which is the order of the pixels that they read.
        let taps = |at: usize, pad: usize| -> Vec<(usize, isize)> {
            let of = |tap: usize| (tap, ((at + pad) as isize - tap as isize) / s as isize);
            (0..k).rev().filter(|tap| (at + pad) % s == tap % s).map(of).collect()
        };
        let mut phases = Vec::with_capacity(s * s);
        for (row, column) in (0..s * s).map(|i| (i / s, i % s)) {
            let (rows, columns) = (taps(row, top), taps(column, left));
            let runs = match columns.first() {
                Some((_, dx)) => {
                    rows.iter().map(|(_, dy)| Run { dy: *dy, dx: *dx, columns: columns.len() }).collect()
                }
                None => Vec::new(),
            };
            let weights = Packed::new(inputs, rows.len() * columns.len() * outputs, |c, i| {
                let (tap, o) = (i / outputs, i % outputs);
                let (ky, kx) = (rows[tap / columns.len()].0, columns[tap % columns.len()].0);
                weight[((o * inputs + c) * k + ky) * k + kx]
            });
            phases.push(Phase { row, column, runs, weights });
        }
        Self { channels: [outputs, inputs], stride: 1, step: s, phases }
    }

    fn run(&self, x: &Images, [h, w]: [usize; 2], bias: Option<&[f32]>) -> Images {
        let mut out = Images::stale(x.n, self.channels[1], h, w);
        let (group, row) = (out.group(), out.pixel() * w);
        let strip = self.rows_per_task(out.groups(), h);
        out.data.par_chunks_mut(group).zip(x.data.par_chunks(x.group())).for_each(|(out, group)| {
            out.par_chunks_mut(strip * row).enumerate().for_each(|(i, out)| {
                let rows = i * strip..i * strip + out.len() / row;
                let padded = self.pad(group, x, [h, w], rows.clone());
                for phase in &self.phases {
                    self.run_phase(phase, &padded, bias, rows.clone(), w, out);
                }
            });
        });
        out
    }

    /// All rows, or less where there are fewer groups of images than threads can use; whole phases.
    fn rows_per_task(&self, groups: usize, h: usize) -> usize {
        let tasks = (2 * rayon::current_num_threads()).div_ceil(groups);
        h.div_ceil(tasks).next_multiple_of(self.step)
    }

    fn run_phase(
        &self,
        phase: &Phase,
        x: &Padded,
        bias: Option<&[f32]>,
        rows: Range<usize>,
        w: usize,
        out: &mut [f32],
    ) {
        let count = |size: usize, at: usize| (size.max(at) - at).div_ceil(self.step);
        let [inputs, outputs] = self.channels;
        let pitch = x.pitch / lanes();
        let first = (rows.start / self.step * self.stride) as isize;
        let origin = [first - x.top, -x.left];
        let grid = Grid {
            rows: count(rows.len(), phase.row),
            columns: count(w, phase.column),
            from: [0, self.stride * pitch, self.stride * inputs],
            to: [(phase.row * w + phase.column) * outputs, self.step * w * outputs, self.step * outputs],
        };
        let start =
            |run: &Run| (run.dy + origin[0]) as usize * pitch + (run.dx + origin[1]) as usize * inputs;
        let segments: Vec<Segment> =
            phase.runs.iter().map(|run| Segment { start: start(run), len: run.columns * inputs }).collect();
        tile::multiply(&phase.weights, &x.data, &segments, bias, grid, out);
    }

    /// What the output rows `rows` of a group read, with zeros around the image; the image itself if that is all.
    fn pad<'a>(&self, group: &'a [f32], x: &Images, size: [usize; 2], rows: Range<usize>) -> Padded<'a> {
        let runs = || self.phases.iter().flat_map(|phase| &phase.runs);
        let low = |f: &dyn Fn(&Run) -> isize| runs().map(f).min().unwrap_or(0);
        let high = |f: &dyn Fn(&Run) -> isize| runs().map(f).max().unwrap_or(0);
        let place = |out: usize| (out / self.step * self.stride) as isize;
        let (top, left) = (place(rows.start) + low(&|r| r.dy), low(&|r| r.dx));
        let bottom = place(rows.end - 1) + high(&|r| r.dy) + 1;
        let right = place(size[1] - 1) + high(&|r| r.dx + r.columns as isize);
        let pixel = x.pixel();
        if left >= 0 && right <= x.w as isize && top >= 0 && bottom <= x.h as isize {
            return Padded { data: Data::Whole(group), top: 0, left: 0, pitch: x.w * pixel };
        }
        let pitch = (right - left) as usize * pixel;
        let mut data = Buffer::stale((bottom - top) as usize * pitch);
        let (from, to) = (left.clamp(0, x.w as isize), right.clamp(0, x.w as isize));
        let (before, after) = ((from - left) as usize * pixel, (to - left) as usize * pixel);
        for (y, row) in (top..bottom).zip(data.chunks_exact_mut(pitch)) {
            if y < 0 || y >= x.h as isize {
                row.fill(0.0);
                continue;
            }
            let line = &group[y as usize * x.w * pixel..][..x.w * pixel];
            row[..before].fill(0.0);
            row[before..after].copy_from_slice(&line[from as usize * pixel..to as usize * pixel]);
            row[after..].fill(0.0);
        }
        Padded { data: Data::Copy(data), top, left, pitch }
    }

    /// Sums of gradient times input over some groups: `[out, taps·in]`.
    fn sums(&self, x: &[Padded], gradients: &[f32], shape: &Images) -> Vec<f32> {
        let ([inputs, outputs], lanes) = (self.channels, lanes());
        let runs = &self.phases[0].runs;
        let depth = runs.iter().map(|run| run.columns * inputs).sum::<usize>();
        let mut tasks = Vec::new();
        for first in (0..outputs).step_by(SUM_CHANNELS) {
            for (at, run) in runs.iter().enumerate() {
                let width = run.columns * inputs;
                tasks.extend((0..width).step_by(SUM_TAPS).map(|tap| (first, run, at * width, tap)));
            }
        }
        let done: Vec<(usize, usize, usize, Vec<f32>)> = tasks
            .into_par_iter()
            .map(|(first, run, start, tap)| {
                let channels = (outputs - first).min(SUM_CHANNELS);
                let taps = (run.columns * inputs - tap).min(SUM_TAPS);
                let mut sums = Sums::new(channels, taps);
                for (x, gradient) in x.iter().zip(gradients.chunks_exact(shape.group())) {
                    let pitch = x.pitch / lanes;
                    let origin = (run.dy - x.top) as usize * pitch + (run.dx - x.left) as usize * inputs;
                    let place = [origin + tap, self.stride * pitch, self.stride * inputs, 1];
                    let x = Matrix { data: &x.data, place };
                    let place = [first, shape.w * outputs, outputs, 1];
                    let gradient = Matrix { data: gradient, place };
                    sums.correlate(gradient, x, [shape.h, shape.w]);
                }
                (first, start + tap, taps, sums.total())
            })
            .collect();
        let mut sums = vec![0.0; outputs * depth];
        for (first, start, taps, values) in done {
            for (i, row) in values.chunks_exact(taps).enumerate() {
                sums[(first + i) * depth + start..][..taps].copy_from_slice(row);
            }
        }
        sums
    }
}
