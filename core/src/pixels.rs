//! From network values to bytes: the one rounding rule that every runtime shares.

/// One image of interleaved 8-bit samples.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// 1 (grey) or 3 (RGB), or whatever the model has.
    pub channels: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// `height · width · channels` bytes, channel fastest.
    pub data: Vec<u8>,
}

/// Turns one image in `range` into bytes: `floor(clamp((v − lo) / (hi − lo), 0, 1)·255 + 0.5)`. NaN becomes 0.
///
/// # Shapes
/// `values`: `[channels, height, width]`.
///
/// # Panics
/// If `values` does not have `channels · height · width` elements.
pub fn to_image(values: &[f32], [channels, height, width]: [usize; 3], [lo, hi]: [f32; 2]) -> Image {
    assert_eq!(values.len(), channels * height * width, "values do not fill the image");
    let plane = height * width;
    let data = (0..plane * channels)
        .map(|i| {
            let v = (values[i % channels * plane + i / channels] - lo) / (hi - lo);
            (v.clamp(0.0, 1.0) * 255.0 + 0.5).floor() as u8
        })
        .collect();
    Image { channels, height, width, data }
}

/// The inverse of [`to_image`] at the 256 levels, into `[channels, height, width]`.
pub fn from_image(image: &Image, [lo, hi]: [f32; 2]) -> Vec<f32> {
    let plane = image.height * image.width;
    (0..plane * image.channels)
        .map(|i| {
            let byte = image.data[i % plane * image.channels + i / plane];
            lo + (hi - lo) * (f32::from(byte) / 255.0)
        })
        .collect()
}

/// Lays images of one size on a white sheet, row by row, with `gap` pixels around each.
///
/// # Panics
/// If the images differ in size or there are none.
pub fn grid(images: &[Image], columns: usize, gap: usize) -> Image {
    let Image { channels, height, width, .. } = images[0];
    let columns = columns.clamp(1, images.len());
    let rows = images.len().div_ceil(columns);
    let (sheet_h, sheet_w) = (rows * (height + gap) + gap, columns * (width + gap) + gap);
    let mut data = vec![255; sheet_h * sheet_w * channels];
    for (i, image) in images.iter().enumerate() {
        assert_eq!((image.channels, image.height, image.width), (channels, height, width), "sizes differ");
        let (top, left) = (gap + i / columns * (height + gap), gap + i % columns * (width + gap));
        for y in 0..height {
            let to = ((top + y) * sheet_w + left) * channels;
            let row = width * channels;
            data[to..to + row].copy_from_slice(&image.data[y * row..(y + 1) * row]);
        }
    }
    Image { channels, height: sheet_h, width: sheet_w, data }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_half_up_and_cut_at_the_range() {
        let level = |v: f32| to_image(&[v], [1, 1, 1], [0.0, 1.0]).data[0];
        assert_eq!([level(-3.0), level(0.0), level(1.0), level(7.0), level(f32::NAN)], [0, 0, 255, 255, 0]);
        assert_eq!([level(0.499 / 255.0), level(0.501 / 255.0)], [0, 1]);
    }

    #[test]
    fn bytes_survive_the_round_trip() {
        let image = Image { channels: 3, height: 16, width: 16, data: (0..768).map(|i| i as u8).collect() };
        for range in [[-1.0, 1.0], [0.0, 1.0]] {
            assert_eq!(to_image(&from_image(&image, range), [3, 16, 16], range), image);
        }
    }

    #[test]
    fn a_grid_places_every_image() {
        let one = |v| Image { channels: 1, height: 1, width: 2, data: vec![v, v] };
        let sheet = grid(&[one(1), one(2), one(3)], 2, 1);
        assert_eq!((sheet.height, sheet.width), (5, 7));
        assert_eq!(sheet.data[7..14], [255, 1, 1, 255, 2, 2, 255]);
        assert_eq!(sheet.data[21..28], [255, 3, 3, 255, 255, 255, 255]);
        let tall = |v| Image {
            channels: 3,
            height: 2,
            width: 1,
            data: [v, v + 1, v + 2, v + 3, v + 4, v + 5].into(),
        };
        let sheet = grid(&[tall(10), tall(20)], 1, 0);
        assert_eq!((sheet.height, sheet.width), (4, 1));
        assert_eq!(sheet.data, [10, 11, 12, 13, 14, 15, 20, 21, 22, 23, 24, 25]);
    }
}
