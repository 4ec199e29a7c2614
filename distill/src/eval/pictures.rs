//! A set of 8-bit images: what people see of a model's output, and what is judged.

use candle_core::{Device, Tensor};
use dmd_core::pixels::to_image;

use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::random::{Purpose, Random};

/// Images, with the class that each was asked for or belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pictures {
    /// `[channels, height, width]`.
    pub shape: [usize; 3],
    /// One byte per value, image by image, channel planes.
    pub bytes: Vec<u8>,
    /// One per image, if there are classes.
    pub classes: Option<Vec<u32>>,
}

impl Pictures {
    /// Rounded as [`dmd_core::pixels`] says, from values in `range`, image by image.
    pub fn quantised(shape: [usize; 3], values: &[f32], range: [f32; 2], classes: Option<Vec<u32>>) -> Self {
        let plane = [1, shape[1], shape[2]];
        let bytes = values.chunks_exact(plane[1] * plane[2]);
        let bytes = bytes.flat_map(|values| to_image(values, plane, range).data).collect();
        Self { shape, bytes, classes }
    }

    /// From a batch.
    ///
    /// # Shapes
    /// `x`: `[n, c, h, w]` in `range`.
    pub fn from_tensor(x: &Tensor, range: [f32; 2], classes: Option<Vec<u32>>) -> Result<Self> {
        let (_, c, h, w) = x.dims4()?;
        Ok(Self::quantised([c, h, w], &x.flatten_all()?.to_vec1::<f32>()?, range, classes))
    }

    /// `count` images of a data set, as many of each class as of the others if it has classes, and always the same.
    pub fn balanced(data: &Dataset, count: usize) -> Result<Self> {
        let class_of = |i: usize| usize::from(data.labels.get(i).copied().unwrap_or(0));
        let classes = (0..data.len()).map(class_of).max().unwrap_or(0) + 1;
        let mut chosen = Vec::with_capacity(count);
        for class in 0..classes {
            let wanted = count / classes + usize::from(class < count % classes);
            let members: Vec<usize> = (0..data.len()).filter(|i| class_of(*i) == class).collect();
            if members.len() < wanted {
                return Err(Error::Request(format!(
                    "there are {} images of class {class}, expected {wanted} for a total of {count} in equal parts",
                    members.len()
                )));
            }
            let order = Random::new(1, Purpose::Metrics, class as u64).permutation(members.len());
            chosen.extend(order.iter().take(wanted).map(|i| members[*i as usize]));
        }
        let size: usize = data.shape.iter().product();
        Ok(Self {
            shape: data.shape,
            bytes: chosen.iter().flat_map(|i| &data.images[i * size..(i + 1) * size]).copied().collect(),
            classes: (!data.labels.is_empty()).then(|| chosen.iter().map(|i| class_of(*i) as u32).collect()),
        })
    }

    /// Appends images of the same shape; classes are kept if both have them.
    pub fn append(&mut self, other: Self) {
        self.bytes.extend(other.bytes);
        self.classes = match (self.classes.take(), other.classes) {
            (Some(mut all), Some(more)) => {
                all.extend(more);
                Some(all)
            }
            _ => None,
        };
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.shape.iter().product::<usize>().max(1)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Some of the images, in `range`.
    ///
    /// # Shapes
    /// `[count, c, h, w]` f32.
    pub fn batch(&self, first: usize, count: usize, [lo, hi]: [f32; 2], device: &Device) -> Result<Tensor> {
        let [c, h, w] = self.shape;
        let size = c * h * w;
        let values = self.bytes[first * size..(first + count) * size].iter();
        let values: Vec<f32> = values.map(|v| lo + (hi - lo) * f32::from(*v) / 255.0).collect();
        Ok(Tensor::from_vec(values, (count, c, h, w), device)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(counts: [usize; 3]) -> Dataset {
        let labels: Vec<u8> = (0..3).flat_map(|class| vec![class as u8; counts[class]]).collect();
        Dataset { shape: [1, 1, 2], images: (0..2 * labels.len()).map(|i| i as u8).collect(), labels }
    }

    #[test]
    fn a_balanced_choice_has_equal_parts_or_is_refused() {
        let chosen = Pictures::balanced(&data([5, 9, 4]), 11).unwrap();
        assert_eq!(chosen.classes.clone().unwrap(), [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]);
        assert_eq!(chosen, Pictures::balanced(&data([5, 9, 4]), 11).unwrap());
        let mut pixels = chosen.bytes.clone();
        pixels.sort_unstable();
        pixels.dedup();
        assert_eq!(pixels.len(), 22, "an image was taken twice");
        let small = Pictures::balanced(&data([5, 9, 4]), 15).unwrap_err().to_string();
        assert!(small.contains("4 images of class 2, expected 5"), "{small}");
    }

    #[test]
    fn colours_stay_in_their_planes() {
        let values: Vec<f32> = (0..12).map(|v| v as f32 / 11.0).collect();
        let pictures = Pictures::quantised([3, 1, 2], &values, [0.0, 1.0], None);
        assert_eq!(pictures.len(), 2);
        assert!(pictures.bytes.is_sorted() && pictures.bytes[11] == 255);
        let back = pictures.batch(1, 1, [0.0, 1.0], &Device::Cpu).unwrap();
        assert_eq!(back.dims(), [1, 3, 1, 2]);
        assert_eq!(Pictures::from_tensor(&back, [0.0, 1.0], None).unwrap().bytes, pictures.bytes[6..]);
    }
}
