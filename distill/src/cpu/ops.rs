//! The denoisers' vocabulary on the CPU engine.

use std::ops::Range;
use std::sync::Arc;

use dmd_core::net::{
    Activation, BatchNorm, Conv2d, ConvTranspose2d, Embedding, GroupNorm, Linear, Ops, Pool,
    TimestepEmbedding,
};

use super::images::Images;
use super::pass::{Input, Places};
use super::simd::add_to;
use super::tape::{Tape, Value};
use super::{attention, conv, layout, norm};
use crate::ops::Error;
use crate::statistics::BatchStatistics;

type Result<T, E = Error> = std::result::Result<T, E>;

/// [`Ops`] on [`Images`]; records a tape where a gradient is wanted.
pub struct CpuOps<'a> {
    pub(super) flat: &'a [f32],
    pub(super) places: &'a Places,
    /// Whether parameters get gradients.
    pub(super) train: bool,
    pub(super) tape: Tape,
    /// Where BatchNorm leaves the statistics of its batch, if it normalises by them.
    pub(super) statistics: Option<BatchStatistics>,
}

/// Weight and bias of one layer.
#[derive(Clone)]
pub(super) struct Affine {
    pub(super) weight: Range<usize>,
    pub(super) bias: Range<usize>,
}

impl CpuOps<'_> {
    /// From now on BatchNorm normalises by the statistics of its own batch, and leaves them here.
    pub fn use_batch_statistics(&mut self, statistics: BatchStatistics) {
        self.statistics = Some(statistics);
    }

    /// One number per image, as an image of one pixel.
    pub fn numbers(&self, values: &[f32]) -> Value {
        self.constant(Images::from_nchw(values, [values.len(), 1, 1, 1]))
    }

    fn constant(&self, images: Images) -> Value {
        Value { images: Arc::new(images), slot: None }
    }

    /// One of the network's arguments.
    pub(super) fn input(&mut self, input: &Input) -> Value {
        let images = Images::from_nchw(&self.flat[input.place.clone()], input.shape);
        let slot = input.track.then(|| self.tape.slot());
        if let Some(slot) = slot {
            let place = input.place.clone();
            self.tape.push(slot, move |gradient, all| gradient.to_nchw(&mut all.d_flat[place]));
        }
        Value { images: Arc::new(images), slot }
    }

    fn place(&self, name: &str, suffix: &str) -> Result<Range<usize>> {
        let key = format!("{name}.{suffix}");
        let place = self.places.get(&key).cloned();
        place.ok_or_else(|| candle_core::Error::CannotFindTensor { path: key }.bt().into())
    }

    pub(super) fn affine(&self, name: &str) -> Result<Affine> {
        Ok(Affine { weight: self.place(name, "weight")?, bias: self.place(name, "bias")? })
    }

    /// The result of an operation, with a place for its gradient if it has one.
    pub(super) fn result(&mut self, images: Images, tracked: bool) -> Value {
        Value { images: Arc::new(images), slot: tracked.then(|| self.tape.slot()) }
    }

    /// `x` for `n` images, where it may be one that stands for all.
    fn broadcast(&mut self, x: &Value, n: usize) -> Value {
        if x.images.n == n {
            return x.clone();
        }
        let (c, h, w) = (x.images.c, x.images.h, x.images.w);
        let mut one = vec![0.0; c * h * w];
        x.images.to_nchw(&mut one);
        let y = self.result(Images::from_nchw(&one.repeat(n), [n, c, h, w]), x.slot.is_some());
        if let Some(slot) = y.slot {
            let x = x.slot;
            self.tape.push(slot, move |gradient, all| {
                let mut values = vec![0.0; n * c * h * w];
                gradient.to_nchw(&mut values);
                let mut sum = vec![0.0; c * h * w];
                values.chunks_exact(c * h * w).for_each(|image| add_to(&mut sum, image));
                all.add(x, Images::from_nchw(&sum, [1, c, h, w]));
            });
        }
        y
    }

    fn convolution(&mut self, x: &Value, name: &str, spec: Conv2d) -> Result<Value> {
        let layer = self.affine(name)?;
        let (weight, bias) = (&self.flat[layer.weight.clone()], &self.flat[layer.bias.clone()]);
        let out = conv::forward(&spec, &x.images, weight, Some(bias));
        let y = self.result(out, x.slot.is_some() || self.train);
        if let Some(slot) = y.slot {
            let (x, train) = (x.clone(), self.train);
            self.tape.push(slot, move |gradient, all| {
                if train {
                    let [d_weight, d_bias] = all.pair(&layer.weight, &layer.bias);
                    conv::backward_weight(&spec, &x.images, &gradient, d_weight);
                    conv::backward_bias(&gradient, d_bias);
                }
                if x.slot.is_some() {
                    let size = [x.images.h, x.images.w];
                    let dx = conv::backward_input(&spec, &gradient, &all.flat[layer.weight], size, None);
                    all.add(x.slot, dx);
                }
            });
        }
        Ok(y)
    }
}

/// A linear map of the channels, as a convolution.
fn one_by_one(spec: Linear) -> Conv2d {
    Conv2d {
        in_channels: spec.in_features,
        out_channels: spec.out_features,
        kernel: 1,
        stride: 1,
        padding: [0; 4],
    }
}

impl Ops for CpuOps<'_> {
    type Value = Value;
    type Error = Error;

    fn timestep(&mut self, t: f64) -> Result<Value> {
        Ok(self.numbers(&[t as f32]))
    }

    fn timestep_embedding(&mut self, t: &Value, spec: TimestepEmbedding) -> Result<Value> {
        let frequencies: Vec<f32> = spec.frequencies().iter().map(|f| *f as f32).collect();
        let mut values = vec![0.0; t.images.n];
        t.images.to_nchw(&mut values);
        let embedding = values.iter().flat_map(|t| {
            let sin = frequencies.iter().map(move |f| (t * f).sin());
            let cos = frequencies.iter().map(move |f| (t * f).cos());
            let (first, second): (Vec<f32>, Vec<f32>) = (sin.collect(), cos.collect());
            if spec.flip_sin_to_cos { [second, first].concat() } else { [first, second].concat() }
        });
        let embedding: Vec<f32> = embedding.collect();
        Ok(self.constant(Images::from_nchw(&embedding, [values.len(), spec.features, 1, 1])))
    }

    fn embedding(&mut self, index: &Value, name: &str, spec: Embedding) -> Result<Value> {
        let place = self.place(name, "weight")?;
        let mut rows = vec![0.0; index.images.n];
        index.images.to_nchw(&mut rows);
        let rows: Vec<usize> = rows.iter().map(|row| *row as usize).collect();
        if let Some(row) = rows.iter().find(|row| **row >= spec.rows) {
            return Err(dmd_core::Error::Request(format!(
                "got class {row}, expected 0 to {}",
                spec.rows - 1
            ))
            .into());
        }
        let table = &self.flat[place.clone()];
        let values: Vec<f32> =
            rows.iter().flat_map(|row| &table[row * spec.features..][..spec.features]).copied().collect();
        let y = self.result(Images::from_nchw(&values, [rows.len(), spec.features, 1, 1]), self.train);
        if let Some(slot) = y.slot {
            self.tape.push(slot, move |gradient, all| {
                let mut values = vec![0.0; rows.len() * spec.features];
                gradient.to_nchw(&mut values);
                let table = &mut all.d_flat[place];
                for (row, d) in rows.iter().zip(values.chunks_exact(spec.features)) {
                    add_to(&mut table[row * spec.features..][..spec.features], d);
                }
            });
        }
        Ok(y)
    }

    fn linear(&mut self, x: &Value, name: &str, spec: Linear) -> Result<Value> {
        self.convolution(x, name, one_by_one(spec))
    }

    fn pointwise(&mut self, x: &Value, name: &str, spec: Linear) -> Result<Value> {
        self.convolution(x, name, one_by_one(spec))
    }

    fn conv2d(&mut self, x: &Value, name: &str, spec: Conv2d) -> Result<Value> {
        self.convolution(x, name, spec)
    }

    fn group_norm(&mut self, x: &Value, name: &str, spec: GroupNorm) -> Result<Value> {
        let layer = self.affine(name)?;
        let (weight, bias) = (&self.flat[layer.weight.clone()], &self.flat[layer.bias.clone()]);
        let out = norm::forward(&spec, &x.images, weight, bias);
        let y = self.result(out, x.slot.is_some() || self.train);
        if let Some(slot) = y.slot {
            let x = x.clone();
            self.tape.push(slot, move |gradient, all| {
                let flat = all.flat;
                let (weight, bias) = (&flat[layer.weight.clone()], &flat[layer.bias.clone()]);
                let [d_weight, d_bias] = all.pair(&layer.weight, &layer.bias);
                let dx = norm::backward(&spec, &x.images, weight, bias, gradient, d_weight, d_bias);
                all.add(x.slot, dx);
            });
        }
        Ok(y)
    }

    fn conv_transpose2d(&mut self, x: &Value, name: &str, spec: ConvTranspose2d) -> Result<Value> {
        let (layer, conv) = (self.affine(name)?, spec.convolution());
        let side = |side: usize| {
            let expected = format!("an image that is larger than the padding {}", spec.padding);
            let error = || dmd_core::Error::Shape { name: name.to_owned(), got: vec![side], expected };
            spec.output(side).ok_or_else(error)
        };
        let size = [side(x.images.h)?, side(x.images.w)?];
        let (weight, bias) = (&self.flat[layer.weight.clone()], &self.flat[layer.bias.clone()]);
        let out = conv::backward_input(&conv, &x.images, weight, size, Some(bias));
        let y = self.result(out, x.slot.is_some() || self.train);
        if let Some(slot) = y.slot {
            let (x, train) = (x.clone(), self.train);
            self.tape.push(slot, move |gradient, all| {
                if train {
                    let [d_weight, d_bias] = all.pair(&layer.weight, &layer.bias);
                    conv::backward_weight(&conv, &gradient, &x.images, d_weight);
                    conv::backward_bias(&gradient, d_bias);
                }
                if x.slot.is_some() {
                    all.add(x.slot, conv::forward(&conv, &gradient, &all.flat[layer.weight], None));
                }
            });
        }
        Ok(y)
    }

    fn batch_norm(&mut self, x: &Value, name: &str, spec: BatchNorm) -> Result<Value> {
        if let Some(statistics) = self.statistics.clone() {
            return self.batch_norm_of_batch(x, name, spec, &statistics);
        }
        let layer = self.affine(name)?;
        let (mean, variance) = (self.place(name, "running_mean")?, self.place(name, "running_var")?);
        let fixed = norm::Fixed::new(&self.flat[mean], &self.flat[variance], spec.eps);
        let (weight, bias) = (&self.flat[layer.weight.clone()], &self.flat[layer.bias.clone()]);
        let y = self.result(fixed.forward(&x.images, weight, bias), x.slot.is_some() || self.train);
        if let Some(slot) = y.slot {
            let x = x.clone();
            self.tape.push(slot, move |gradient, all| {
                let flat = all.flat;
                let weight = &flat[layer.weight.clone()];
                let [d_weight, d_bias] = all.pair(&layer.weight, &layer.bias);
                let dx = fixed.backward(&x.images, weight, gradient, d_weight, d_bias);
                all.add(x.slot, dx);
            });
        }
        Ok(y)
    }

    fn activate(&mut self, x: &Value, activation: Activation) -> Result<Value> {
        let y = self.result(layout::activate(&x.images, activation), x.slot.is_some());
        if let Some(slot) = y.slot {
            let x = x.clone();
            self.tape.push(slot, move |mut gradient, all| {
                layout::activate_backward(&x.images, activation, &mut gradient);
                all.add(x.slot, gradient);
            });
        }
        Ok(y)
    }

    fn pool(&mut self, x: &Value, pool: Pool, size: usize) -> Result<Value> {
        let y = self.result(layout::pool(&x.images, pool, size), x.slot.is_some());
        if let Some(slot) = y.slot {
            let (x, y) = (x.clone(), y.images.clone());
            self.tape.push(slot, move |gradient, all| {
                all.add(x.slot, layout::pool_backward(&x.images, &y, pool, size, &gradient));
            });
        }
        Ok(y)
    }

    fn one_hot(&mut self, index: &Value, rows: usize) -> Result<Value> {
        let mut values = vec![0.0; index.images.n];
        index.images.to_nchw(&mut values);
        let ones = values.iter().flat_map(|index| (0..rows).map(move |row| f32::from(row as f32 == *index)));
        Ok(self.constant(Images::from_nchw(&ones.collect::<Vec<_>>(), [values.len(), rows, 1, 1])))
    }

    fn feature(&mut self, x: &Value, factor: f64) -> Result<Value> {
        self.scale(x, factor)
    }

    fn narrow(&mut self, x: &Value, first: usize, count: usize) -> Result<Value> {
        let y = self.result(layout::narrow(&x.images, first, count), x.slot.is_some());
        if let Some(slot) = y.slot {
            let (channels, x) = (x.images.c, x.slot);
            self.tape.push(slot, move |gradient, all| all.add(x, layout::widen(&gradient, first, channels)));
        }
        Ok(y)
    }

    fn scale_channels(&mut self, x: &Value, factor: &Value) -> Result<Value> {
        let n = x.images.n.max(factor.images.n);
        let (x, factor) = (self.broadcast(x, n), self.broadcast(factor, n));
        let out = layout::scale_channels(&x.images, &factor.images);
        let y = self.result(out, x.slot.or(factor.slot).is_some());
        if let Some(slot) = y.slot {
            self.tape.push(slot, move |gradient, all| {
                if factor.slot.is_some() {
                    let product = layout::multiply(&gradient, &x.images);
                    all.add(factor.slot, layout::sum_pixels(&product));
                }
                all.add(x.slot, layout::scale_channels(&gradient, &factor.images));
            });
        }
        Ok(y)
    }

    fn add(&mut self, a: &Value, b: &Value) -> Result<Value> {
        let n = a.images.n.max(b.images.n);
        let (a, b) = (self.broadcast(a, n), self.broadcast(b, n));
        let y = self.result(layout::add(&a.images, &b.images), a.slot.or(b.slot).is_some());
        if let Some(slot) = y.slot {
            let (a, b) = (a.slot, b.slot);
            self.tape.push(slot, move |gradient, all| {
                if a.is_some() && b.is_some() {
                    all.add(a, gradient.copy());
                    all.add(b, gradient);
                } else {
                    all.add(a.or(b), gradient);
                }
            });
        }
        Ok(y)
    }

    fn add_bias(&mut self, x: &Value, bias: &Value) -> Result<Value> {
        let bias = self.broadcast(bias, x.images.n);
        let y = self.result(layout::add_bias(&x.images, &bias.images), x.slot.or(bias.slot).is_some());
        if let Some(slot) = y.slot {
            let (x, bias) = (x.slot, bias.slot);
            self.tape.push(slot, move |gradient, all| {
                if bias.is_some() {
                    all.add(bias, layout::sum_pixels(&gradient));
                }
                all.add(x, gradient);
            });
        }
        Ok(y)
    }

    fn scale(&mut self, x: &Value, factor: f64) -> Result<Value> {
        let mut out = x.images.copy();
        layout::scale(&mut out, factor as f32);
        let y = self.result(out, x.slot.is_some());
        if let Some(slot) = y.slot {
            let x = x.slot;
            self.tape.push(slot, move |mut gradient, all| {
                layout::scale(&mut gradient, factor as f32);
                all.add(x, gradient);
            });
        }
        Ok(y)
    }

    fn concat(&mut self, a: &Value, b: &Value) -> Result<Value> {
        let y = self.result(layout::concat(&a.images, &b.images), a.slot.or(b.slot).is_some());
        if let Some(slot) = y.slot {
            let (first, second) = (a.images.c, b.images.c);
            let (a, b) = (a.slot, b.slot);
            self.tape.push(slot, move |gradient, all| {
                all.add(a, layout::narrow(&gradient, 0, first));
                all.add(b, layout::narrow(&gradient, first, second));
            });
        }
        Ok(y)
    }

    fn upsample_nearest2x(&mut self, x: &Value) -> Result<Value> {
        let y = self.result(layout::upsample(&x.images), x.slot.is_some());
        if let Some(slot) = y.slot {
            let x = x.slot;
            self.tape.push(slot, move |gradient, all| all.add(x, layout::sum_squares(&gradient)));
        }
        Ok(y)
    }

    fn attention(&mut self, q: &Value, k: &Value, v: &Value, heads: usize) -> Result<Value> {
        let out = attention::forward(&q.images, &k.images, &v.images, heads);
        let y = self.result(out, [q, k, v].iter().any(|value| value.slot.is_some()));
        if let Some(slot) = y.slot {
            let (q, k, v) = (q.clone(), k.clone(), v.clone());
            self.tape.push(slot, move |gradient, all| {
                let [dq, dk, dv] = attention::backward(&q.images, &k.images, &v.images, heads, &gradient);
                all.add(q.slot, dq);
                all.add(k.slot, dk);
                all.add(v.slot, dv);
            });
        }
        Ok(y)
    }
}
