//! Operations composed of candle's own, each with a right gradient on every device: what CUDA uses, and what the
//! CPU kernels are checked against.

use candle_core::{D, DType, Result, Tensor};
use dmd_core::net::{Activation, BatchNorm, Conv2d, GroupNorm, Pool};

use super::FEW_VALUES;

/// See [`dmd_core::net::Ops::conv2d`]. What a stride leaves unread is cut off, because candle's gradient has the wrong
/// shape otherwise.
pub fn conv2d(x: &Tensor, weight: &Tensor, bias: &Tensor, spec: Conv2d) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    let [top, left, bottom, right] = spec.padding;
    let used = |size: usize| (size - spec.kernel) / spec.stride * spec.stride + spec.kernel;
    let (height, width) = (h + top + bottom, w + left + right);
    let even = top == left && top == bottom && top == right;
    let y = if even && used(height) == height && used(width) == width {
        x.conv2d(weight, top, spec.stride, 1, 1)?
    } else {
        let x = x.pad_with_zeros(2, top, bottom)?.pad_with_zeros(3, left, right)?;
        x.narrow(2, 0, used(height))?.narrow(3, 0, used(width))?.conv2d(weight, 0, spec.stride, 1, 1)?
    };
    y.broadcast_add(&bias.reshape((1, spec.out_channels, 1, 1))?)
}

/// See [`dmd_core::net::Ops::group_norm`].
pub fn group_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, spec: GroupNorm) -> Result<Tensor> {
    let (n, c, h, w) = x.dims4()?;
    let count = c / spec.groups * h * w;
    let precise = if count <= FEW_VALUES { DType::F64 } else { DType::F32 };
    let grouped = x.to_dtype(precise)?.reshape((n, spec.groups, count))?;
    let centred = grouped.broadcast_sub(&grouped.mean_keepdim(2)?)?;
    let variance = centred.sqr()?.mean_keepdim(2)?;
    let normal = centred.broadcast_div(&(variance + spec.eps)?.sqrt()?)?.reshape((n, c, h, w))?;
    let normal = normal.to_dtype(DType::F32)?;
    let y = normal.broadcast_mul(&per_channel(weight)?)?.broadcast_add(&per_channel(bias)?)?;
    let y = if spec.silu { y.silu()? } else { y };
    y.to_dtype(x.dtype())
}

/// See [`dmd_core::net::Ops::batch_norm`]; weight, bias, mean and variance.
pub fn batch_norm(
    x: &Tensor,
    [weight, bias, mean, variance]: [&Tensor; 4],
    spec: BatchNorm,
) -> Result<Tensor> {
    let deviation = (per_channel(variance)? + spec.eps)?.sqrt()?;
    let normal = x.to_dtype(DType::F32)?.broadcast_sub(&per_channel(mean)?)?.broadcast_div(&deviation)?;
    normal.broadcast_mul(&per_channel(weight)?)?.broadcast_add(&per_channel(bias)?)?.to_dtype(x.dtype())
}

/// BatchNorm by the statistics of the batch itself, with gradients through them; and mean and unbiased variance `[c]`, detached.
pub fn batch_norm_of_batch(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    spec: BatchNorm,
) -> Result<(Tensor, [Tensor; 2])> {
    let (n, c, h, w) = x.dims4()?;
    let count = (n * h * w) as f64;
    let x32 = x.to_dtype(DType::F32)?;
    let mean = x32.mean_keepdim((0, 2, 3))?;
    let centred = x32.broadcast_sub(&mean)?;
    let variance = centred.sqr()?.mean_keepdim((0, 2, 3))?;
    let normal = centred.broadcast_div(&(&variance + spec.eps)?.sqrt()?)?;
    let y = normal.broadcast_mul(&per_channel(weight)?)?.broadcast_add(&per_channel(bias)?)?;
    let unbiased = (variance.detach() * (count / (count - 1.0)))?;
    Ok((y.to_dtype(x.dtype())?, [mean.detach().reshape(c)?, unbiased.reshape(c)?]))
}

/// A value per channel as f32 `[1, c, 1, 1]`.
fn per_channel(values: &Tensor) -> Result<Tensor> {
    values.to_dtype(DType::F32)?.reshape((1, (), 1, 1))
}

/// See [`dmd_core::net::Ops::add_bias`].
pub fn add_bias(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    x.broadcast_add(&bias.unsqueeze(2)?.unsqueeze(3)?)
}

/// See [`dmd_core::net::Ops::upsample_nearest2x`].
pub fn upsample_nearest2x(x: &Tensor) -> Result<Tensor> {
    let (n, c, h, w) = x.dims4()?;
    x.reshape((n, c, h, 1, w, 1))?.broadcast_as((n, c, h, 2, w, 2))?.reshape((n, c, 2 * h, 2 * w))
}

/// See [`dmd_core::net::Ops::attention`]; the softmax is composed, because candle's fused one has no gradient.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Result<Tensor> {
    let (n, c, h, w) = q.dims4()?;
    let split = |x: &Tensor| x.reshape((n * heads, c / heads, h * w));
    let (q, k, v) = (split(q)?, split(k)?, split(v)?);
    let q = (q * ((c / heads) as f64).powf(-0.5))?;
    let scores = q.transpose(1, 2)?.contiguous()?.matmul(&k)?.to_dtype(DType::F32)?;
    let scores = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    let weights = scores.broadcast_div(&scores.sum_keepdim(D::Minus1)?)?.to_dtype(v.dtype())?;
    v.matmul(&weights.transpose(1, 2)?.contiguous()?)?.reshape((n, c, h, w))
}

/// See [`dmd_core::net::Ops::activate`]; candle's own `relu` has the gradient 1 at 0.
pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::Silu => x.silu(),
        Activation::Gelu => x.gelu_erf(),
        Activation::Relu => x * x.gt(0.0)?.to_dtype(x.dtype())?,
        // tanh(ln(1 + e)) = (e² + 2e)/(e² + 2e + 2), which is 1 in f32 long before e² overflows.
        Activation::Mish => {
            let e = x.minimum(20.0)?.exp()?;
            let above = (e.sqr()? + (e * 2.0)?)?;
            x * (&above / (&above + 2.0)?)?
        }
    }
}

/// See [`dmd_core::net::Ops::pool`]; candle's own pools have wrong gradients.
pub fn pool(x: &Tensor, pool: Pool, size: usize) -> Result<Tensor> {
    let (n, c, h, w) = x.dims4()?;
    let (oh, ow) = (h / size, w / size);
    let squares = x.narrow(2, 0, oh * size)?.narrow(3, 0, ow * size)?.reshape((n * c, oh, size, ow, size))?;
    let squares = squares.permute((0, 1, 3, 2, 4))?.reshape((n * c * oh * ow, size * size))?;
    let y = match pool {
        Pool::Max => squares.gather(&squares.argmax_keepdim(1)?, 1)?,
        Pool::Average => squares.mean_keepdim(1)?,
    };
    y.reshape((n, c, oh, ow))
}
