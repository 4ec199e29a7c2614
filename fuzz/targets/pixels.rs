//! Values to pixels and back, grids, and noise between two noises: any floats.
#![no_main]

use dmd_core::noise::{slerp, standard_normal, step_noise};
use dmd_core::pixels::{Image, from_image, grid, to_image};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (Vec<f32>, f64, [f32; 2], u32, u64, u16, u8)| {
    let (values, share, range, seed, image, step, columns) = input;
    let n = values.len();
    dmd_fuzz::within(4 * n, 16, || {
        let [c, side] = if n.is_multiple_of(3) { [3, n / 3] } else { [1, n] };
        let made = to_image(&values, [c, 1, side], range);
        assert_eq!(made.data.len(), n);
        for range in [[-1.0, 1.0], [0.0, 1.0]] {
            assert_eq!(to_image(&from_image(&made, range), [c, 1, side], range), made);
        }
        let Image { height, width, .. } = grid(&[made.clone(), made.clone()], usize::from(columns), 1);
        assert!(height >= 3 && width >= side + 2);

        let (mut noise, mut fresh) = (vec![0.0; n], vec![0.0; n]);
        standard_normal(seed, image, &mut noise);
        step_noise(seed, image, usize::from(step), &mut fresh);
        assert!(noise.iter().chain(&fresh).all(|v| v.abs() < 7.0), "2^-32 is 6.66 standard deviations away");
        let mut between = vec![0.0; n];
        slerp(&noise, &fresh, share.clamp(0.0, 1.0), &mut between);
        assert!(share.is_nan() || between.iter().all(|v| v.is_finite()));
        slerp(&values, &noise, share, &mut between);
    });
});
