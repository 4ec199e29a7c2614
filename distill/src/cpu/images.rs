//! A batch of images as the kernels see it: groups of as many images as a vector has lanes, in each group
//! `[height, width, channels, lanes]`. Vectors of features are images of one pixel.

use super::memory::Buffer;
use super::simd::lanes;

/// `n` images; lanes beyond `n` in the last group hold finite numbers that mean nothing.
pub struct Images {
    /// Images.
    pub n: usize,
    /// Channels.
    pub c: usize,
    /// Height.
    pub h: usize,
    /// Width.
    pub w: usize,
    /// The values, group by group.
    pub data: Buffer,
}

impl Images {
    /// Images with stale content: the caller writes all of it.
    pub fn stale(n: usize, c: usize, h: usize, w: usize) -> Self {
        let data = Buffer::stale(n.div_ceil(lanes()) * h * w * c * lanes());
        Self { n, c, h, w, data }
    }

    /// Images of the same shape with stale content.
    pub fn like(&self) -> Self {
        Self::stale(self.n, self.c, self.h, self.w)
    }

    /// A copy.
    pub fn copy(&self) -> Self {
        let mut copy = self.like();
        copy.data.copy_from_slice(&self.data);
        copy
    }

    /// From `[n, c, h, w]`.
    pub fn from_nchw(values: &[f32], [n, c, h, w]: [usize; 4]) -> Self {
        let (mut images, lanes, pixels) = (Self::stale(n, c, h, w), lanes(), h * w);
        let group = images.group();
        for (g, to) in images.data.chunks_exact_mut(group).enumerate() {
            for lane in 0..lanes {
                let image = values.chunks_exact(c * pixels).nth(g * lanes + lane);
                for channel in 0..c {
                    for pixel in 0..pixels {
                        let value = image.map_or(0.0, |image| image[channel * pixels + pixel]);
                        to[(pixel * c + channel) * lanes + lane] = value;
                    }
                }
            }
        }
        images
    }

    /// To `[n, c, h, w]`.
    pub fn to_nchw(&self, out: &mut [f32]) {
        let (lanes, pixels, c) = (lanes(), self.h * self.w, self.c);
        for (i, image) in out.chunks_exact_mut(c * pixels).enumerate() {
            let from = &self.data[i / lanes * self.group()..][..self.group()];
            for channel in 0..c {
                for pixel in 0..pixels {
                    image[channel * pixels + pixel] = from[(pixel * c + channel) * lanes + i % lanes];
                }
            }
        }
    }

    /// Floats in one group.
    pub fn group(&self) -> usize {
        self.h * self.w * self.pixel()
    }

    /// Floats in one pixel of a group.
    pub fn pixel(&self) -> usize {
        self.c * lanes()
    }

    /// Number of groups.
    pub fn groups(&self) -> usize {
        self.n.div_ceil(lanes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_return_unchanged() {
        for shape in [[1, 1, 1, 1], [3, 2, 4, 5], [8, 3, 2, 2], [17, 1, 3, 1]] {
            let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| i as f32).collect();
            let images = Images::from_nchw(&values, shape);
            let mut back = vec![0.0; values.len()];
            images.to_nchw(&mut back);
            assert_eq!(back, values);
        }
    }
}
