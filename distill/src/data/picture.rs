//! One picture in the size and channels that a base works on: grey or colour, squashed without cropping, by the `image` crate's
//! triangle filter (bilinear, widened where it shrinks).

use image::imageops::{FilterType, resize};
use image::{DynamicImage, GrayImage, RgbImage};
use rayon::prelude::*;

use super::Dataset;
use crate::error::{Error, Result};

/// The channel planes of a picture, fitted to `[channels, height, width]` with 1 or 3 channels; transparency is dropped.
pub fn planes(picture: &DynamicImage, [c, h, w]: [usize; 3]) -> Vec<u8> {
    let (width, height) = (w as u32, h as u32);
    let same = picture.width() == width && picture.height() == height;
    if c == 1 {
        let grey = picture.to_luma8();
        return if same {
            grey.into_raw()
        } else {
            resize(&grey, width, height, FilterType::Triangle).into_raw()
        };
    }
    let colour = picture.to_rgb8();
    let colour = if same { colour } else { resize(&colour, width, height, FilterType::Triangle) };
    let values = colour.into_raw();
    (0..3).flat_map(|channel| values.iter().skip(channel).step_by(3)).copied().collect()
}

/// A picture of channel planes.
fn from_planes(planes: &[u8], [c, h, w]: [usize; 3]) -> Option<DynamicImage> {
    let (width, height, size) = (w as u32, h as u32, h * w);
    match c {
        1 => GrayImage::from_raw(width, height, planes.to_vec()).map(DynamicImage::from),
        3 => {
            let values = (0..size).flat_map(|i| [planes[i], planes[size + i], planes[2 * size + i]]);
            RgbImage::from_raw(width, height, values.collect()).map(DynamicImage::from)
        }
        _ => None,
    }
}

/// A data set whose images have the given shape.
pub fn fit(data: Dataset, shape: [usize; 3]) -> Result<Dataset> {
    if data.shape == shape {
        return Ok(data);
    }
    let fitted = data.images.par_chunks_exact(data.shape.iter().product()).map(|image| {
        let picture = from_planes(image, data.shape);
        let channels = data.shape[0];
        let error =
            || Error::Request(format!("images of {channels} channels cannot be resized, only of 1 or 3"));
        Ok(planes(&picture.ok_or_else(error)?, shape))
    });
    let images = fitted.collect::<Result<Vec<_>>>()?.concat();
    Ok(Dataset { shape, images, labels: data.labels })
}
