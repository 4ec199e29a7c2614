//! [`Ops`] on constants: plain loops that sum in f64 and round each result to f32. Slow and right.
//!
//! The exporter folds with it, and on a constant image it evaluates the whole network: the reference that exported
//! files are compared with. Must not take short cuts for speed.

use std::collections::BTreeMap;

use dmd_core::net::{
    self, Activation, BatchNorm, Conv2d, ConvTranspose2d, Embedding, GroupNorm, Linear, Ops, Pool,
    TimestepEmbedding,
};

use crate::{Array, Checkpoint, Error, Result};

/// Predicted noise of a checkpoint's network, without any folding.
///
/// # Shapes
/// `x_t` `[n, c, h, w]`, `t` one step for all or one per image, `class` one per image; returns `[n, c, h, w]`.
pub fn eps_pred(checkpoint: &Checkpoint, x_t: &Array, t: &[f32], class: Option<&[usize]>) -> Result<Array> {
    let t = Array::new(&[t.len()], t.to_vec())?;
    let class = class.map(class_array);
    net::denoise(&mut Evaluate::new(&checkpoint.weights), &checkpoint.config, x_t, &t, class.as_ref())
}

/// Images of a generator checkpoint, without any folding.
///
/// # Shapes
/// `z` `[n, c, h, w]`, `class` one per image; returns `[n, c, h, w]`.
pub fn x_gen(checkpoint: &Checkpoint, z: &Array, class: Option<&[usize]>) -> Result<Array> {
    let (one_step, class) = (checkpoint.one_step()?, class.map(class_array));
    net::one_step(&mut Evaluate::new(&checkpoint.weights), &checkpoint.config, &one_step, z, class.as_ref())
}

/// Class indices as values, `[n]`.
pub fn class_array(class: &[usize]) -> Array {
    Array { shape: vec![class.len()], data: class.iter().map(|&c| c as f32).collect() }
}

/// The interpreter. Counts how often each parameter is read.
pub struct Evaluate<'a> {
    weights: &'a BTreeMap<String, Array>,
    /// Reads so far, by parameter.
    pub reads: BTreeMap<String, usize>,
}

impl<'a> Evaluate<'a> {
    /// Starts with nothing read.
    pub fn new(weights: &'a BTreeMap<String, Array>) -> Self {
        Self { weights, reads: BTreeMap::new() }
    }

    /// Reads the parameter `name` and checks its shape.
    pub fn parameter(&mut self, name: &str, shape: &[usize]) -> Result<&'a Array> {
        let wrong = |got: &[usize]| dmd_core::Error::Shape {
            name: name.to_owned(),
            got: got.to_vec(),
            expected: format!("{shape:?}"),
        };
        let array = self.weights.get(name).ok_or_else(|| wrong(&[]))?;
        if array.shape != shape {
            return Err(wrong(&array.shape).into());
        }
        *self.reads.entry(name.to_owned()).or_default() += 1;
        Ok(array)
    }

    /// Factor and summand per channel that a normalisation with fixed statistics amounts to.
    pub fn fixed_norm(&mut self, name: &str, spec: BatchNorm) -> Result<(Vec<f64>, Vec<f64>)> {
        let mut read = |suffix: &str| self.parameter(&format!("{name}.{suffix}"), &[spec.channels]);
        let (weight, bias) = (read("weight")?, read("bias")?);
        let (mean, variance) = (read("running_mean")?, read("running_var")?);
        let scale: Vec<f64> = (weight.data.iter().zip(&variance.data))
            .map(|(&w, &v)| f64::from(w) / (f64::from(v) + spec.eps).sqrt())
            .collect();
        let shift = (bias.data.iter().zip(&mean.data).zip(&scale))
            .map(|((&b, &m), scale)| f64::from(b) - f64::from(m) * scale)
            .collect();
        Ok((scale, shift))
    }

    fn affine(&mut self, name: &str, weight: &[usize]) -> Result<(&'a Array, &'a Array)> {
        let w = self.parameter(&format!("{name}.weight"), weight)?;
        Ok((w, self.parameter(&format!("{name}.bias"), &weight[..1])?))
    }
}

/// `[n, c, h, w]` as numbers.
fn image<const N: usize>(name: &str, x: &Array) -> Result<[usize; N]> {
    x.shape
        .as_slice()
        .try_into()
        .map_err(|_| Error::Array(format!("`{name}`: got shape {:?}, expected {N} axes", x.shape)))
}

fn features(name: &str, got: usize, expected: usize) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::Array(format!("`{name}`: got {got} channels, expected {expected}")))
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + libm::exp(-x))
}

fn active(activation: Activation, x: f32) -> f32 {
    let x = f64::from(x);
    let y = match activation {
        Activation::Silu => x * sigmoid(x),
        Activation::Gelu => 0.5 * x * (1.0 + libm::erf(x / std::f64::consts::SQRT_2)),
        Activation::Relu if x < 0.0 => 0.0,
        Activation::Relu => x,
        Activation::Mish => x * libm::tanh(libm::log1p(libm::exp(x.min(700.0)))),
    };
    y as f32
}

impl Ops for Evaluate<'_> {
    type Value = Array;
    type Error = Error;

    fn timestep(&mut self, t: f64) -> Result<Array> {
        Array::new(&[1], vec![t as f32])
    }

    fn timestep_embedding(&mut self, t: &Array, spec: TimestepEmbedding) -> Result<Array> {
        let frequencies: Vec<f32> = spec.frequencies().iter().map(|&f| f as f32).collect();
        let mut data = Vec::with_capacity(t.data.len() * spec.features);
        for &t in &t.data {
            let angles = || frequencies.iter().map(|f| f64::from(t * f));
            let (sin, cos) = (angles().map(libm::sin), angles().map(libm::cos));
            let both: Vec<f64> =
                if spec.flip_sin_to_cos { cos.chain(sin).collect() } else { sin.chain(cos).collect() };
            data.extend(both.iter().map(|&v| v as f32));
        }
        Array::new(&[t.rows(), spec.features], data)
    }

    fn embedding(&mut self, index: &Array, name: &str, spec: Embedding) -> Result<Array> {
        let table = self.parameter(&format!("{name}.weight"), &[spec.rows, spec.features])?;
        let mut data = Vec::with_capacity(index.data.len() * spec.features);
        for &i in &index.data {
            if !(0.0..spec.rows as f32).contains(&i) || i.fract() != 0.0 {
                let last = spec.rows - 1;
                return Err(Error::Array(format!("`{name}`: got class {i}, expected 0 to {last}")));
            }
            data.extend_from_slice(table.row(i as usize));
        }
        Array::new(&[index.rows(), spec.features], data)
    }

    fn unused(&mut self, name: &str, shape: &[usize]) {
        let _ = self.parameter(name, shape); // counts the read; a wrong shape is found when the checkpoint is loaded
    }

    fn linear(&mut self, x: &Array, name: &str, spec: Linear) -> Result<Array> {
        let [n, input] = image(name, x)?;
        features(name, input, spec.in_features)?;
        let (weight, bias) = self.affine(name, &[spec.out_features, spec.in_features])?;
        let mut data = Vec::with_capacity(n * spec.out_features);
        for i in 0..n {
            for (o, &b) in bias.data.iter().enumerate() {
                let products = weight.row(o).iter().zip(x.row(i)).map(|(&w, &v)| f64::from(w) * f64::from(v));
                data.push((f64::from(b) + products.sum::<f64>()) as f32);
            }
        }
        Array::new(&[n, spec.out_features], data)
    }

    fn pointwise(&mut self, x: &Array, name: &str, spec: Linear) -> Result<Array> {
        let (weight, bias) = self.affine(name, &[spec.out_features, spec.in_features])?;
        let spec = Conv2d {
            in_channels: spec.in_features,
            out_channels: spec.out_features,
            kernel: 1,
            stride: 1,
            padding: [0; 4],
        };
        convolve(x, name, spec, weight, bias)
    }

    fn conv2d(&mut self, x: &Array, name: &str, spec: Conv2d) -> Result<Array> {
        let shape = [spec.out_channels, spec.in_channels, spec.kernel, spec.kernel];
        let (weight, bias) = self.affine(name, &shape)?;
        convolve(x, name, spec, weight, bias)
    }

    fn group_norm(&mut self, x: &Array, name: &str, spec: GroupNorm) -> Result<Array> {
        let [n, c, h, w] = image(name, x)?;
        features(name, c, spec.channels)?;
        let (weight, bias) = self.affine(name, &[spec.channels])?;
        let size = c / spec.groups * h * w;
        let mut out = x.clone();
        for i in 0..n * spec.groups {
            let group = &mut out.data[i * size..(i + 1) * size];
            let mean = group.iter().map(|&v| f64::from(v)).sum::<f64>() / size as f64;
            let variance = group.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / size as f64;
            let scale = 1.0 / (variance + spec.eps).sqrt();
            for (j, v) in group.iter_mut().enumerate() {
                let channel = (i % spec.groups * size + j) / (h * w);
                let (w, b) = (f64::from(weight.data[channel]), f64::from(bias.data[channel]));
                *v = ((f64::from(*v) - mean) * scale * w + b) as f32;
            }
        }
        if spec.silu { self.activate(&out, Activation::Silu) } else { Ok(out) }
    }

    fn conv_transpose2d(&mut self, x: &Array, name: &str, spec: ConvTranspose2d) -> Result<Array> {
        let [n, c, h, w] = image(name, x)?;
        features(name, c, spec.in_channels)?;
        let (k, outputs) = (spec.kernel, spec.out_channels);
        let weight = self.parameter(&format!("{name}.weight"), &[c, outputs, k, k])?;
        let bias = self.parameter(&format!("{name}.bias"), &[outputs])?;
        let side =
            |side| spec.output(side).ok_or_else(|| Error::Array(format!("`{name}`: got a side of {side}")));
        let (oh, ow) = (side(h)?, side(w)?);
        let mut out = Vec::with_capacity(n * outputs * oh * ow);
        for i in 0..n {
            for (o, &b) in bias.data.iter().enumerate() {
                let mut sums = vec![f64::from(b); oh * ow];
                for at in 0..c * h * w * k * k {
                    let (tap, pixel) = (at % (k * k), at / (k * k));
                    let (channel, y, column) = (pixel / (h * w), pixel / w % h, pixel % w);
                    let place = |at: usize, tap: usize| (at * spec.stride + tap).checked_sub(spec.padding);
                    let (Some(y), Some(column)) = (place(y, tap / k), place(column, tap % k)) else {
                        continue;
                    };
                    if y < oh && column < ow {
                        let factor = weight.data[(channel * outputs + o) * k * k + tap];
                        sums[y * ow + column] += f64::from(factor) * f64::from(x.row(i)[pixel]);
                    }
                }
                out.extend(sums.iter().map(|&v| v as f32));
            }
        }
        Array::new(&[n, outputs, oh, ow], out)
    }

    fn batch_norm(&mut self, x: &Array, name: &str, spec: BatchNorm) -> Result<Array> {
        let [_, c, h, w] = image(name, x)?;
        features(name, c, spec.channels)?;
        let (scale, shift) = self.fixed_norm(name, spec)?;
        let mut out = x.clone();
        for (i, v) in out.data.iter_mut().enumerate() {
            let channel = i / (h * w) % c;
            *v = (f64::from(*v) * scale[channel] + shift[channel]) as f32;
        }
        Ok(out)
    }

    fn activate(&mut self, x: &Array, activation: Activation) -> Result<Array> {
        Ok(Array { shape: x.shape.clone(), data: x.data.iter().map(|&v| active(activation, v)).collect() })
    }

    fn pool(&mut self, x: &Array, pool: Pool, size: usize) -> Result<Array> {
        let [n, c, h, w] = image("pool", x)?;
        let (oh, ow) = (h / size, w / size);
        let mut data = Vec::with_capacity(n * c * oh * ow);
        for i in 0..n * c * oh * ow {
            let (plane, y, column) = (i / (oh * ow), i / ow % oh, i % ow);
            let square = (0..size * size)
                .map(|tap| x.data[plane * h * w + (y * size + tap / size) * w + column * size + tap % size]);
            data.push(match pool {
                Pool::Max => square.fold(f32::NEG_INFINITY, |a, b| if b > a || b.is_nan() { b } else { a }),
                Pool::Average => (square.map(f64::from).sum::<f64>() / (size * size) as f64) as f32,
            });
        }
        Array::new(&[n, c, oh, ow], data)
    }

    fn one_hot(&mut self, index: &Array, rows: usize) -> Result<Array> {
        let data = index.data.iter().flat_map(|&i| (0..rows).map(move |row| f32::from(row as f32 == i)));
        Array::new(&[index.rows(), rows], data.collect())
    }

    fn feature(&mut self, x: &Array, factor: f64) -> Result<Array> {
        let data = x.data.iter().map(|v| v * factor as f32).collect();
        Array::new(&[x.rows(), 1], data)
    }

    fn narrow(&mut self, x: &Array, first: usize, count: usize) -> Result<Array> {
        let (rows, inner) = (x.rows(), x.shape.iter().skip(2).product::<usize>());
        let shape: Vec<usize> = [&[rows, count], x.shape.get(2..).unwrap_or_default()].concat();
        let part = first * inner..(first + count) * inner;
        let data = (0..rows).flat_map(|i| x.row(i)[part.clone()].iter().copied()).collect();
        Array::new(&shape, data)
    }

    fn scale_channels(&mut self, x: &Array, factor: &Array) -> Result<Array> {
        per_channel("scale_channels", x, factor, |v, factor| v * factor)
    }

    fn add(&mut self, a: &Array, b: &Array) -> Result<Array> {
        a.zip_rows(b, |x, y| x + y)
    }

    fn add_bias(&mut self, x: &Array, bias: &Array) -> Result<Array> {
        per_channel("add_bias", x, bias, |v, bias| v + bias)
    }

    fn scale(&mut self, x: &Array, factor: f64) -> Result<Array> {
        let factor = factor as f32;
        Ok(Array { shape: x.shape.clone(), data: x.data.iter().map(|v| v * factor).collect() })
    }

    fn concat(&mut self, a: &Array, b: &Array) -> Result<Array> {
        let ([_, ca, h, w], [_, cb, ..]) = (image::<4>("concat", a)?, image::<4>("concat", b)?);
        let rows = a.common_rows(b)?;
        let data = (0..rows).flat_map(|i| a.row(i).iter().chain(b.row(i)).copied()).collect();
        Array::new(&[rows, ca + cb, h, w], data)
    }

    fn upsample_nearest2x(&mut self, x: &Array) -> Result<Array> {
        let [n, c, h, w] = image("upsample", x)?;
        let mut data = Vec::with_capacity(4 * x.data.len());
        for row in x.data.chunks(w) {
            for _ in 0..2 {
                data.extend(row.iter().flat_map(|&v| [v, v]));
            }
        }
        Array::new(&[n, c, 2 * h, 2 * w], data)
    }

    fn attention(&mut self, q: &Array, k: &Array, v: &Array, heads: usize) -> Result<Array> {
        let [n, c, h, w] = image("attention", q)?;
        if k.shape != q.shape || v.shape != q.shape {
            let got = format!("{:?} and {:?}", k.shape, v.shape);
            return Err(Error::Array(format!("attention: got {got}, expected {:?}", q.shape)));
        }
        let (d, pixels) = (c / heads, h * w);
        let scale = 1.0 / (d as f64).sqrt();
        let mut out = vec![0.0; q.data.len()];
        for head in 0..n * heads {
            let part = head * d * pixels..(head + 1) * d * pixels;
            let (q, k, v) = (&q.data[part.clone()], &k.data[part.clone()], &v.data[part.clone()]);
            let dot = |i: usize, j: usize| -> f64 {
                (0..d).map(|r| f64::from(q[r * pixels + i]) * f64::from(k[r * pixels + j])).sum()
            };
            let out = &mut out[part];
            for i in 0..pixels {
                let scores: Vec<f64> = (0..pixels).map(|j| scale * dot(i, j)).collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let powers: Vec<f64> = scores.iter().map(|s| libm::exp(s - top)).collect();
                let total: f64 = powers.iter().sum();
                for r in 0..d {
                    let row = &v[r * pixels..(r + 1) * pixels];
                    let sum: f64 = powers.iter().zip(row).map(|(p, &v)| p * f64::from(v)).sum();
                    out[r * pixels + i] = (sum / total) as f32;
                }
            }
        }
        Array::new(&q.shape, out)
    }
}

/// `f(x, value of its channel)` for `x` `[n, c, h, w]` and `values` `[n, c]`.
fn per_channel(name: &str, x: &Array, values: &Array, f: impl Fn(f32, f32) -> f32) -> Result<Array> {
    let ([_, c, h, w], rows) = (image(name, x)?, x.common_rows(values)?);
    features(name, values.data.len() / values.rows(), c)?;
    let mut data = Vec::with_capacity(rows * c * h * w);
    for i in 0..rows {
        let (pixels, values) = (x.row(i), values.row(i));
        data.extend(pixels.iter().enumerate().map(|(j, &v)| f(v, values[j / (h * w)])));
    }
    Array::new(&[rows, c, h, w], data)
}

fn convolve(x: &Array, name: &str, spec: Conv2d, weight: &Array, bias: &Array) -> Result<Array> {
    let [n, c, h, w] = image(name, x)?;
    features(name, c, spec.in_channels)?;
    let [top, left, bottom, right] = spec.padding;
    let (k, stride) = (spec.kernel, spec.stride);
    if h + top + bottom < k || w + left + right < k {
        return Err(Error::Array(format!(
            "`{name}`: got an image of {h} by {w}, expected at least {k} by {k}"
        )));
    }
    let (oh, ow) = ((h + top + bottom - k) / stride + 1, (w + left + right - k) / stride + 1);
    let mut out = Vec::with_capacity(n * spec.out_channels * oh * ow);
    for i in 0..n {
        let image = x.row(i);
        for (o, &b) in bias.data.iter().enumerate() {
            let mut sums = vec![f64::from(b); oh * ow];
            for (tap, &factor) in weight.row(o).iter().enumerate() {
                let (channel, ky, kx) = (tap / (k * k), tap / k % k, tap % k);
                let plane = &image[channel * h * w..(channel + 1) * h * w];
                for (y, sums) in sums.chunks_mut(ow).enumerate() {
                    let Some(y) = (y * stride + ky).checked_sub(top).filter(|y| *y < h) else { continue };
                    let row = &plane[y * w..(y + 1) * w];
                    for (x, sum) in sums.iter_mut().enumerate() {
                        if let Some(&v) = (x * stride + kx).checked_sub(left).and_then(|x| row.get(x)) {
                            *sum += f64::from(factor) * f64::from(v);
                        }
                    }
                }
            }
            out.extend(sums.iter().map(|&v| v as f32));
        }
    }
    Array::new(&[n, spec.out_channels, oh, ow], out)
}
