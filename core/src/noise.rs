//! The noise contract `dmd-noise-1`: image `k` of seed `s` is the same Gaussian noise on every machine.
//!
//! ChaCha with 8 rounds; the key is the seed as u64 little-endian in the first 8 bytes, then zeros; the stream
//! (nonce) is `k`; the block counter starts at 0. Consecutive u32 words `a, b` give `u1 = (a + 1) / 2^32` and
//! `u2 = b / 2^32`, and those the two values `sqrt(-2 ln u1)·cos(2π u2)` and `sqrt(-2 ln u1)·sin(2π u2)`, computed
//! in f64 with the algorithms of musl's libm and rounded to f32. An odd last value uses only the cosine.
//! Nothing here may depend on the batch size, on threads or on std's own mathematics (it differs between targets).

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Name of the contract, as the model card records it.
pub const CONTRACT: &str = "dmd-noise-1";

/// Fills `out` with the standard normal noise of image `image` of seed `seed`.
pub fn standard_normal(seed: u32, image: u64, out: &mut [f32]) {
    normal(&mut stream(u64::from(seed), image), out);
}

/// Fills `out` with the standard normal noise that ancestral sampling adds to image `image` of seed `seed` after its
/// step number `step`, counted from 0: the same words with `step + 1` as u64 little-endian in bytes 8 to 15 of the key.
pub fn step_noise(seed: u32, image: u64, step: usize, out: &mut [f32]) {
    normal(&mut keyed(u64::from(seed), step as u64 + 1, image), out);
}

/// Fills `out` with the point at `t` in [0, 1] of the great arc from `a` (0) to `b` (1), the arc being that through
/// their directions: `sin((1 − t)·ω)/sin ω·a + sin(t·ω)/sin ω·b` with `ω` the angle between them; f64 inside. Between two
/// independent Gaussian images it keeps their length, which a straight line does not. Shoemake 1985 (SIGGRAPH), "Animating
/// rotation with quaternion curves". Where the angle has no arc (parallel, opposite, zero) it is the straight line.
///
/// # Panics
/// If the three differ in length.
pub fn slerp(a: &[f32], b: &[f32], t: f64, out: &mut [f32]) {
    assert!(a.len() == b.len() && a.len() == out.len(), "noise of different sizes");
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let cosine = dot(a, b) / libm::sqrt(dot(a, a) * dot(b, b));
    let angle = libm::acos(cosine.clamp(-1.0, 1.0));
    let sine = libm::sin(angle);
    let (from, to) = if sine > 1e-6 {
        (libm::sin((1.0 - t) * angle) / sine, libm::sin(t * angle) / sine)
    } else {
        (1.0 - t, t) // also where `sine` is NaN
    };
    for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
        *out = (from * f64::from(*a) + to * f64::from(*b)) as f32;
    }
}

/// The random words behind the contract: key `seed`, stream `stream`.
pub fn stream(seed: u64, stream: u64) -> ChaCha8Rng {
    keyed(seed, 0, stream)
}

fn keyed(seed: u64, second: u64, stream: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&second.to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(key);
    rng.set_stream(stream);
    rng
}

/// Fills `out` with standard normal values from a stream of words (Box and Muller 1958).
pub fn normal(rng: &mut impl Rng, out: &mut [f32]) {
    const SCALE: f64 = 1.0 / 4_294_967_296.0;
    for pair in out.chunks_mut(2) {
        let u1 = (f64::from(rng.next_u32()) + 1.0) * SCALE;
        let u2 = f64::from(rng.next_u32()) * SCALE;
        let radius = libm::sqrt(-2.0 * libm::log(u1));
        let angle = std::f64::consts::TAU * u2;
        pair[0] = (radius * libm::cos(angle)) as f32;
        if let Some(second) = pair.get_mut(1) {
            *second = (radius * libm::sin(angle)) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(seed: u32, image: u64, n: usize) -> Vec<u32> {
        let mut out = vec![0.0; n];
        standard_normal(seed, image, &mut out);
        out.iter().map(|v| v.to_bits()).collect()
    }

    #[test]
    fn an_image_does_not_depend_on_its_length_or_neighbours() {
        assert_eq!(bits(42, 7, 5), bits(42, 7, 9)[..5]);
        assert_ne!(bits(42, 7, 4), bits(42, 8, 4));
        assert_ne!(bits(42, 7, 4), bits(43, 7, 4));
    }

    /// The first values of `docs/noise.md`.
    #[test]
    fn the_contract_does_not_change() {
        let mut out = [0.0; 4];
        standard_normal(42, 0, &mut out);
        assert_eq!(out.map(f32::to_bits), [0xbf9f_0f7e, 0x3fe0_0e0f, 0xbefa_dfbf, 0x4009_74d8]);
    }

    #[test]
    fn every_step_has_noise_of_its_own() {
        let fresh = |step: usize| {
            let mut out = [0.0; 4];
            step_noise(42, 7, step, &mut out);
            out.map(f32::to_bits)
        };
        assert_ne!(fresh(0)[..], bits(42, 7, 4)[..]);
        assert_ne!(fresh(0), fresh(1));
    }

    #[test]
    fn an_arc_keeps_its_ends_and_the_length() {
        let (mut a, mut b) = (vec![0.0; 3072], vec![0.0; 3072]);
        standard_normal(1, 0, &mut a);
        standard_normal(2, 0, &mut b);
        let at = |t: f64| {
            let mut out = vec![0.0; a.len()];
            slerp(&a, &b, t, &mut out);
            out
        };
        assert_eq!((at(0.0), at(1.0)), (a.clone(), b.clone()));
        let length = |x: &[f32]| x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let (middle, ends) = (at(0.5), (length(&a) + length(&b)) / 2.0);
        assert!((length(&middle) / ends - 1.0).abs() < 0.01, "{} and {ends}", length(&middle));
        // a quarter turn: the middle of (1, 0) and (0, 1) is (√½, √½)
        let mut quarter = [0.0; 2];
        slerp(&[1.0, 0.0], &[0.0, 1.0], 0.5, &mut quarter);
        assert_eq!(quarter, [std::f32::consts::FRAC_1_SQRT_2; 2]);
        for other in [[2.0, 0.0], [-1.0, 0.0], [0.0, 0.0]] {
            slerp(&[1.0, 0.0], &other, 0.5, &mut quarter);
            assert_eq!(quarter, [(1.0 + other[0]) / 2.0, 0.0]);
        }
    }

    #[test]
    fn it_is_standard_normal() {
        let mut x = vec![0.0; 200_000];
        standard_normal(1, 0, &mut x);
        let n = x.len() as f64;
        let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let moment = |p: i32| x.iter().map(|&v| (f64::from(v) - mean).powi(p)).sum::<f64>() / n;
        assert!(mean.abs() < 0.01, "mean {mean}");
        assert!((moment(2) - 1.0).abs() < 0.01, "variance {}", moment(2));
        assert!((moment(4) - 3.0).abs() < 0.06, "fourth moment {}", moment(4));
    }
}
