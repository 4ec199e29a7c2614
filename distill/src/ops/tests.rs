//! Forward and gradients of the CPU kernels against the compositions of candle operations.

use candle_core::{Device, Tensor, Var};
use dmd_core::compare::{Tolerance, close};
use dmd_core::net::{Conv2d, GroupNorm};
use dmd_core::noise;

use super::*;

fn random(stream: u64, shape: &[usize]) -> Var {
    let mut data = vec![0.0; shape.iter().product()];
    noise::standard_normal(5, stream, &mut data);
    Var::from_tensor(&Tensor::from_vec(data, shape, &Device::Cpu).unwrap()).unwrap()
}

fn flat(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

const TOLERANCE: Tolerance = Tolerance { abs: 2e-4, rel: 1e-4 };

/// Compares values and the gradients of every argument under a random cotangent; arguments are also used directly,
/// so that accumulated gradients are covered.
fn check(
    what: &str,
    args: &[Var],
    fast: impl Fn(&[Tensor]) -> Result<Tensor>,
    slow: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let tensors: Vec<Tensor> = args.iter().map(|v| v.as_tensor().clone()).collect();
    let (y, expected) = (fast(&tensors).unwrap(), slow(&tensors).unwrap());
    close(&flat(&y), &flat(&expected), TOLERANCE).unwrap_or_else(|e| panic!("{what}: {e}"));
    let cotangent = random(99, y.dims());
    let gradients = |y: &Tensor| {
        let extra = (tensors[0].sqr().unwrap().sum_all().unwrap() * 0.25).unwrap();
        ((y * cotangent.as_tensor()).unwrap().sum_all().unwrap() + extra).unwrap().backward().unwrap()
    };
    let (got, expected) = (gradients(&y), gradients(&expected));
    for (i, var) in args.iter().enumerate() {
        let (got, expected) = (got.get(var).unwrap(), expected.get(var).unwrap());
        close(&flat(got), &flat(expected), TOLERANCE).unwrap_or_else(|e| panic!("{what}, gradient {i}: {e}"));
    }
}

#[test]
fn convolution_equals_candle() {
    let pad = |p: [usize; 4]| p;
    let cases = [
        (3, 5, 3, 1, pad([1; 4]), 7, 7),
        (16, 32, 3, 1, pad([1; 4]), 28, 28),
        (7, 13, 3, 2, pad([1; 4]), 7, 7),
        (5, 4, 3, 2, pad([0, 0, 1, 1]), 8, 8),
        (4, 4, 3, 2, pad([0, 0, 1, 1]), 9, 5),
        (6, 9, 1, 1, pad([0; 4]), 5, 9),
        (1, 1, 3, 1, pad([1; 4]), 1, 1),
        (2, 17, 3, 1, pad([1; 4]), 3, 3),
    ];
    for (i, (ci, co, kernel, stride, padding, h, w)) in cases.into_iter().enumerate() {
        let spec = Conv2d { in_channels: ci, out_channels: co, kernel, stride, padding };
        let args = [random(1, &[6, ci, h, w]), random(2, &[co, ci, kernel, kernel]), random(3, &[co])];
        check(
            &format!("case {i}"),
            &args,
            |t| convolution(&t[0], &t[1], &t[2], spec),
            |t| composed::conv2d(&t[0], &t[1], &t[2], spec),
        );
    }
}

#[test]
fn group_norm_equals_its_composition() {
    for (channels, groups, h, w, silu) in
        [(8, 4, 7, 7, true), (8, 4, 28, 28, false), (12, 1, 3, 3, true), (16, 8, 5, 9, true)]
    {
        let spec = GroupNorm { channels, groups, eps: 1e-5, silu };
        let args = [random(1, &[5, channels, h, w]), random(2, &[channels]), random(3, &[channels])];
        check(
            &format!("{spec:?}"),
            &args,
            |t| t[0].apply_op3(&t[1], &t[2], norm::NormOp(spec)),
            |t| composed::group_norm(&t[0], &t[1], &t[2], spec),
        );
    }
}

#[test]
fn layout_operations_equal_their_compositions() {
    let args = [random(1, &[3, 4, 5, 7]), random(2, &[3, 6, 5, 7])];
    check("concat", &args, |t| t[0].apply_op2(&t[1], layout::Concat), |t| Tensor::cat(t, 1));
    let args = [random(1, &[3, 4, 5, 7])];
    check("upsample", &args, |t| t[0].apply_op1(layout::Upsample), |t| composed::upsample_nearest2x(&t[0]));
    for rows in [1, 3] {
        let args = [random(1, &[3, 4, 5, 7]), random(2, &[rows, 4])];
        check(
            "add_bias",
            &args,
            |t| t[0].apply_op2(&t[1], layout::AddBias),
            |t| composed::add_bias(&t[0], &t[1]),
        );
    }
}

#[test]
fn the_sigmoid_is_exact_to_rounding() {
    for i in -2000..2000 {
        let x = i as f32 * 0.05;
        let expected = (1.0 / (1.0 + (-f64::from(x)).exp())) as f32;
        let got = cpu::sigmoid(x);
        assert!((got - expected).abs() <= 2e-7 * expected.max(1e-30) + 1e-37, "{x}: {got} {expected}");
    }
}

#[test]
fn a_frozen_weight_costs_no_gradient() {
    let spec = Conv2d { in_channels: 2, out_channels: 2, kernel: 3, stride: 1, padding: [1; 4] };
    let x = random(1, &[2, 2, 4, 4]);
    let (weight, bias) =
        (random(2, &[2, 2, 3, 3]).as_detached_tensor(), random(3, &[2]).as_detached_tensor());
    let y = convolution(&x, &weight, &bias, spec).unwrap();
    let grads = y.sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&x).is_some() && grads.get(&weight).is_none());
}
