//! Bilinear change of an image's size, differentiable.

use candle_core::Tensor;

use crate::error::Result;

/// Corners not aligned, no smoothing when an image shrinks: PyTorch's `interpolate(mode="bilinear")`.
///
/// # Shapes
/// `x`: `[n, c, h, w]`; returns `[n, c, side, side]`.
pub fn resize(x: &Tensor, side: usize) -> Result<Tensor> {
    let (n, c, h, w) = x.dims4()?;
    let matrix = |from: usize| -> Result<Tensor> {
        let mut rows = vec![0.0f32; side * from];
        for (i, row) in rows.chunks_exact_mut(from).enumerate() {
            let place = ((i as f64 + 0.5) * from as f64 / side as f64 - 0.5).max(0.0);
            let first = (place as usize).min(from - 1);
            let share = (place - first as f64) as f32;
            row[first] += 1.0 - share;
            row[(first + 1).min(from - 1)] += share;
        }
        Ok(Tensor::from_vec(rows, (side, from), x.device())?)
    };
    let across = x.reshape((n * c * h, w))?.matmul(&matrix(w)?.t()?)?.reshape((n * c, h, side))?;
    let down = matrix(h)?.unsqueeze(0)?.broadcast_as((n * c, side, h))?.contiguous()?;
    Ok(down.matmul(&across)?.reshape((n, c, side, side))?)
}
