//! [`Ops`] on constants: plain loops that sum in f64 and round each result to f32. Slow and right.
//!
//! The exporter folds with it, and on a constant image it evaluates the whole network: the reference that exported
//! files are compared with. Must not take short cuts for speed.

use std::collections::BTreeMap;

use dmd_core::net::{self, Conv2d, Embedding, GroupNorm, Linear, Ops, TimestepEmbedding};

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

fn silu(x: f32) -> f32 {
    (f64::from(x) * sigmoid(f64::from(x))) as f32
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
        if spec.silu { self.silu(&out) } else { Ok(out) }
    }

    fn silu(&mut self, x: &Array) -> Result<Array> {
        Ok(Array { shape: x.shape.clone(), data: x.data.iter().map(|&v| silu(v)).collect() })
    }

    fn add(&mut self, a: &Array, b: &Array) -> Result<Array> {
        a.zip_rows(b, |x, y| x + y)
    }

    fn add_bias(&mut self, x: &Array, bias: &Array) -> Result<Array> {
        let ([_, c, h, w], rows) = (image("bias", x)?, x.common_rows(bias)?);
        features("bias", bias.data.len() / bias.rows(), c)?;
        let mut data = Vec::with_capacity(rows * c * h * w);
        for i in 0..rows {
            let (pixels, bias) = (x.row(i), bias.row(i));
            data.extend(pixels.iter().enumerate().map(|(j, v)| v + bias[j / (h * w)]));
        }
        Array::new(&[rows, c, h, w], data)
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
