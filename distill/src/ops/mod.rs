//! The denoisers' vocabulary on candle tensors, differentiable: compositions of candle operations whose gradients are
//! right on every device (several of candle 0.11's own are wrong or missing). Used on GPUs; on the CPU, where
//! candle's are slow, networks run on [`crate::cpu`], and these are what it is checked against.

mod composed;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result, Tensor};
use dmd_core::net::{
    Activation, BatchNorm, Conv2d, ConvTranspose2d, Embedding, GroupNorm, Linear, Ops, Pool,
    TimestepEmbedding,
};

use crate::statistics::BatchStatistics;

/// GroupNorm over at most so many values gets its gradient in f64, here and in [`crate::cpu`]: it is a small difference of
/// large numbers. Of two values, nothing but the part of `eps` in the variance is left.
pub const FEW_VALUES: usize = 8;

/// What can go wrong while a network runs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The description and its inputs do not fit.
    #[error(transparent)]
    Core(#[from] dmd_core::Error),
    /// candle could not do it.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// [`Ops`] on candle tensors; parameters by checkpoint name. A parameter that is a variable gets a gradient.
///
/// Everything is computed in one type; sums that lose too much in 16 bits (normalisation, softmax) are made in f32.
pub struct CandleOps<'a> {
    parameters: &'a BTreeMap<String, Tensor>,
    device: &'a Device,
    dtype: DType,
    statistics: Option<BatchStatistics>,
}

impl<'a> CandleOps<'a> {
    /// Runs networks with these parameters, which are all on `device`.
    pub fn new(parameters: &'a BTreeMap<String, Tensor>, device: &'a Device) -> Self {
        Self { parameters, device, dtype: DType::F32, statistics: None }
    }

    /// Computes in another type: parameters are converted where they are used, images must come in it.
    pub fn in_type(self, dtype: DType) -> Self {
        Self { dtype, ..self }
    }

    /// From now on BatchNorm normalises by the statistics of its own batch, and leaves them here.
    pub fn use_batch_statistics(&mut self, statistics: BatchStatistics) {
        self.statistics = Some(statistics);
    }

    fn get(&self, name: &str, suffix: &str) -> Result<Tensor> {
        let key = format!("{name}.{suffix}");
        let tensor = self.parameters.get(&key);
        tensor.ok_or_else(|| candle_core::Error::CannotFindTensor { path: key }.bt())?.to_dtype(self.dtype)
    }

    fn affine(&self, name: &str) -> Result<(Tensor, Tensor)> {
        Ok((self.get(name, "weight")?, self.get(name, "bias")?))
    }
}

/// Sum of tensors whose first axis may be 1 in either.
fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.dims() == b.dims() { a + b } else { a.broadcast_add(b) }
}

impl Ops for CandleOps<'_> {
    type Value = Tensor;
    type Error = Error;

    fn timestep(&mut self, t: f64) -> std::result::Result<Tensor, Error> {
        Ok(Tensor::new(&[t as f32], self.device)?)
    }

    fn timestep_embedding(
        &mut self,
        t: &Tensor,
        spec: TimestepEmbedding,
    ) -> std::result::Result<Tensor, Error> {
        let frequencies: Vec<f32> = spec.frequencies().iter().map(|f| *f as f32).collect();
        let frequencies = Tensor::new(frequencies, self.device)?.unsqueeze(0)?;
        let angle = t.to_dtype(DType::F32)?.unsqueeze(1)?.broadcast_mul(&frequencies)?;
        let (sin, cos) = (angle.sin()?, angle.cos()?);
        let halves = if spec.flip_sin_to_cos { [cos, sin] } else { [sin, cos] };
        Ok(Tensor::cat(&halves, 1)?.to_dtype(self.dtype)?)
    }

    fn embedding(&mut self, index: &Tensor, name: &str, _: Embedding) -> std::result::Result<Tensor, Error> {
        Ok(self.get(name, "weight")?.index_select(&index.to_dtype(DType::U32)?, 0)?)
    }

    fn linear(&mut self, x: &Tensor, name: &str, _: Linear) -> std::result::Result<Tensor, Error> {
        let (weight, bias) = self.affine(name)?;
        Ok(x.matmul(&weight.t()?)?.broadcast_add(&bias)?)
    }

    fn pointwise(&mut self, x: &Tensor, name: &str, spec: Linear) -> std::result::Result<Tensor, Error> {
        let (weight, bias) = self.affine(name)?;
        let conv = Conv2d {
            in_channels: spec.in_features,
            out_channels: spec.out_features,
            kernel: 1,
            stride: 1,
            padding: [0; 4],
        };
        let weight = weight.reshape((spec.out_features, spec.in_features, 1, 1))?;
        Ok(composed::conv2d(x, &weight, &bias, conv)?)
    }

    fn conv2d(&mut self, x: &Tensor, name: &str, spec: Conv2d) -> std::result::Result<Tensor, Error> {
        let (weight, bias) = self.affine(name)?;
        Ok(composed::conv2d(x, &weight, &bias, spec)?)
    }

    fn group_norm(&mut self, x: &Tensor, name: &str, spec: GroupNorm) -> std::result::Result<Tensor, Error> {
        let (weight, bias) = self.affine(name)?;
        Ok(composed::group_norm(x, &weight, &bias, spec)?)
    }

    fn conv_transpose2d(
        &mut self,
        x: &Tensor,
        name: &str,
        spec: ConvTranspose2d,
    ) -> std::result::Result<Tensor, Error> {
        let (weight, bias) = self.affine(name)?;
        let y = x.conv_transpose2d(&weight, spec.padding, 0, spec.stride, 1)?;
        Ok(y.broadcast_add(&bias.reshape((1, spec.out_channels, 1, 1))?)?)
    }

    fn batch_norm(&mut self, x: &Tensor, name: &str, spec: BatchNorm) -> std::result::Result<Tensor, Error> {
        let (weight, bias) = self.affine(name)?;
        if let Some(statistics) = &self.statistics {
            let (n, c, h, w) = x.dims4()?;
            if n * h * w < 2 {
                let expected = "at least two values per channel, to take statistics of".to_owned();
                let got = vec![n, c, h, w];
                return Err(dmd_core::Error::Shape { name: name.to_owned(), got, expected }.into());
            }
            let (y, [mean, variance]) = composed::batch_norm_of_batch(x, &weight, &bias, spec)?;
            statistics.record(name, mean, variance);
            return Ok(y);
        }
        let (mean, variance) = (self.get(name, "running_mean")?, self.get(name, "running_var")?);
        Ok(composed::batch_norm(x, [&weight, &bias, &mean, &variance], spec)?)
    }

    fn activate(&mut self, x: &Tensor, activation: Activation) -> std::result::Result<Tensor, Error> {
        Ok(composed::activate(x, activation)?)
    }

    fn pool(&mut self, x: &Tensor, pool: Pool, size: usize) -> std::result::Result<Tensor, Error> {
        Ok(composed::pool(x, pool, size)?)
    }

    fn one_hot(&mut self, index: &Tensor, rows: usize) -> std::result::Result<Tensor, Error> {
        let (n, index) = (index.dims1()?, index.to_dtype(DType::F32)?.unsqueeze(1)?);
        let rows = Tensor::arange(0.0, rows as f32, self.device)?.unsqueeze(0)?;
        let shape = (n, rows.dim(1)?);
        Ok(index.broadcast_as(shape)?.eq(&rows.broadcast_as(shape)?)?.to_dtype(self.dtype)?)
    }

    fn feature(&mut self, x: &Tensor, factor: f64) -> std::result::Result<Tensor, Error> {
        Ok((x.to_dtype(DType::F32)? * factor)?.unsqueeze(1)?.to_dtype(self.dtype)?)
    }

    fn narrow(&mut self, x: &Tensor, first: usize, count: usize) -> std::result::Result<Tensor, Error> {
        Ok(x.narrow(1, first, count)?.contiguous()?)
    }

    fn scale_channels(&mut self, x: &Tensor, factor: &Tensor) -> std::result::Result<Tensor, Error> {
        Ok(x.broadcast_mul(&factor.unsqueeze(2)?.unsqueeze(3)?)?)
    }

    fn add(&mut self, a: &Tensor, b: &Tensor) -> std::result::Result<Tensor, Error> {
        Ok(add(a, b)?)
    }

    fn add_bias(&mut self, x: &Tensor, bias: &Tensor) -> std::result::Result<Tensor, Error> {
        Ok(composed::add_bias(x, bias)?)
    }

    fn scale(&mut self, x: &Tensor, factor: f64) -> std::result::Result<Tensor, Error> {
        Ok((x * factor)?)
    }

    fn concat(&mut self, a: &Tensor, b: &Tensor) -> std::result::Result<Tensor, Error> {
        Ok(Tensor::cat(&[a, b], 1)?)
    }

    fn upsample_nearest2x(&mut self, x: &Tensor) -> std::result::Result<Tensor, Error> {
        Ok(composed::upsample_nearest2x(x)?)
    }

    fn attention(
        &mut self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        heads: usize,
    ) -> std::result::Result<Tensor, Error> {
        Ok(composed::attention(q, k, v, heads)?)
    }
}
