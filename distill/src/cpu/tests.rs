//! The CPU engine against compositions of candle operations: values and gradients, whatever the sizes.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use dmd_core::compare::{Tolerance, close};
use dmd_core::net::{
    Activation, BatchNorm, Conv2d, ConvTranspose2d, Embedding, GroupNorm, Linear, Ops, Pool,
};
use dmd_core::noise;

use super::simd::portable::with_lanes;
use super::{CpuOps, Value, apply};
use crate::ops::{CandleOps, Error};
use crate::statistics::BatchStatistics;

const TOLERANCE: Tolerance = Tolerance { abs: 2e-4, rel: 1e-4 };

fn random(stream: u64, shape: &[usize]) -> Var {
    let mut data = vec![0.0; shape.iter().product()];
    noise::standard_normal(5, stream, &mut data);
    Var::from_tensor(&Tensor::from_vec(data, shape, &Device::Cpu).unwrap()).unwrap()
}

fn flat(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// Compares values and gradients of every argument under a random cotangent, with the vectors of every processor; the
/// first input is also used directly, so that accumulated gradients are covered.
fn check(
    what: &str,
    inputs: &[Var],
    parameters: &[(&str, Var)],
    fast: impl Fn(&mut CpuOps, &[Value]) -> Result<Value, Error> + Clone + Send + Sync + 'static,
    slow: impl Fn(&mut CandleOps, &[Tensor]) -> Result<Tensor, Error>,
) {
    let tensors: Vec<Tensor> = inputs.iter().map(|v| v.as_tensor().clone()).collect();
    let named: BTreeMap<String, Tensor> =
        parameters.iter().map(|(name, v)| ((*name).to_owned(), v.as_tensor().clone())).collect();
    let expected = slow(&mut CandleOps::new(&named, &Device::Cpu), &tensors).unwrap();
    let cotangent = random(99, expected.dims());
    let gradients = |y: &Tensor| -> Vec<Vec<f32>> {
        let mut loss = (y * cotangent.as_tensor()).unwrap().sum_all().unwrap();
        if let Some(x) = tensors.first() {
            loss = (loss + (x.sqr().unwrap().sum_all().unwrap() * 0.25).unwrap()).unwrap();
        }
        let grads = loss.backward().unwrap();
        let trained = parameters.iter().filter(|(name, _)| !name.contains("running"));
        inputs.iter().chain(trained.map(|(_, v)| v)).map(|var| flat(grads.get(var).unwrap())).collect()
    };
    let expected_gradients = gradients(&expected);
    for lanes in [0, 1, 4, 16] {
        let what = format!("{what} with {lanes} lanes");
        let (y, got) = with_lanes(lanes, || {
            let y = apply(&tensors, &named, fast.clone()).unwrap().reshape(expected.shape()).unwrap();
            let got = gradients(&y);
            (y, got)
        });
        close(&flat(&y), &flat(&expected), TOLERANCE).unwrap_or_else(|e| panic!("{what}: {e}"));
        for (i, (got, expected)) in got.iter().zip(&expected_gradients).enumerate() {
            close(got, expected, TOLERANCE).unwrap_or_else(|e| panic!("{what}, gradient {i}: {e}"));
        }
    }
}

#[test]
fn convolution_equals_candle() {
    let cases = [
        (6, 3, 5, 3, 1, [1; 4], 7, 7),
        (33, 16, 32, 3, 1, [1; 4], 14, 14),
        (6, 7, 13, 3, 2, [1; 4], 7, 7),
        (6, 5, 4, 3, 2, [0, 0, 1, 1], 8, 8),
        (17, 4, 4, 3, 2, [0, 0, 1, 1], 9, 5),
        (6, 6, 9, 1, 1, [0; 4], 5, 9),
        (1, 1, 1, 3, 1, [1; 4], 1, 1),
        (9, 2, 17, 3, 1, [1; 4], 3, 3),
        (3, 2, 3, 4, 4, [0; 4], 8, 8),
        (2, 3, 2, 5, 3, [2, 1, 0, 3], 9, 11),
        (2, 2, 2, 1, 2, [0; 4], 7, 8),
    ];
    for (n, ci, co, kernel, stride, padding, h, w) in cases {
        let spec = Conv2d { in_channels: ci, out_channels: co, kernel, stride, padding };
        check(
            &format!("{spec:?} on {n} of {h}x{w}"),
            &[random(1, &[n, ci, h, w])],
            &[("l.weight", random(2, &[co, ci, kernel, kernel])), ("l.bias", random(3, &[co]))],
            move |ops, x| ops.conv2d(&x[0], "l", spec),
            |ops, x| ops.conv2d(&x[0], "l", spec),
        );
    }
}

#[test]
fn group_norm_equals_its_composition() {
    for (channels, groups, h, w, silu) in
        [(8, 4, 7, 7, true), (8, 4, 28, 28, false), (12, 1, 3, 3, true), (16, 8, 5, 9, true)]
    {
        let spec = GroupNorm { channels, groups, eps: 1e-5, silu };
        check(
            &format!("{spec:?}"),
            &[random(1, &[5, channels, h, w])],
            &[("l.weight", random(2, &[channels])), ("l.bias", random(3, &[channels]))],
            move |ops, x| ops.group_norm(&x[0], "l", spec),
            |ops, x| ops.group_norm(&x[0], "l", spec),
        );
    }
}

/// The same lines for both implementations.
macro_rules! equals {
    ($what:expr, $inputs:expr, $parameters:expr, $run:expr) => {
        check($what, $inputs, $parameters, $run, $run)
    };
}

#[test]
fn operations_with_parameters_equal_their_compositions() {
    let spec = ConvTranspose2d { in_channels: 5, out_channels: 3, kernel: 4, stride: 2, padding: 1 };
    let parameters = [("l.weight", random(2, &[5, 3, 4, 4])), ("l.bias", random(3, &[3]))];
    let x = [random(1, &[9, 5, 4, 7])];
    equals!("conv_transpose2d", &x, &parameters, move |ops, x| ops.conv_transpose2d(&x[0], "l", spec));
    let spec = BatchNorm { channels: 5, eps: 1e-5 };
    let variance = Var::from_tensor(&random(6, &[5]).abs().unwrap()).unwrap();
    let parameters = [
        ("l.weight", random(2, &[5])),
        ("l.bias", random(3, &[5])),
        ("l.running_mean", random(4, &[5])),
        ("l.running_var", variance),
    ];
    equals!("batch_norm", &x, &parameters, move |ops, x| ops.batch_norm(&x[0], "l", spec));
    let spec = Linear { in_features: 5, out_features: 7 };
    let parameters = [("l.weight", random(2, &[7, 5])), ("l.bias", random(3, &[7]))];
    equals!("pointwise", &x, &parameters, move |ops, x| ops.pointwise(&x[0], "l", spec));
    let spec = Embedding { rows: 4, features: 6, frozen: false };
    let parameters = [("l.weight", random(2, &[4, 6]))];
    let index = [3.0f32, 0.0, 3.0, 1.0, 2.0, 3.0, 0.0, 0.0, 1.0, 3.0];
    check(
        "embedding",
        &[],
        &parameters,
        move |ops, _| {
            let index = ops.numbers(&index);
            ops.embedding(&index, "l", spec)
        },
        |ops, _| ops.embedding(&Tensor::new(&index, &Device::Cpu)?, "l", spec),
    );
}

#[test]
fn operations_without_parameters_equal_their_compositions() {
    let x = [random(1, &[11, 4, 6, 8]), random(2, &[11, 4, 6, 8])];
    for activation in [Activation::Silu, Activation::Gelu, Activation::Relu, Activation::Mish] {
        let name = format!("{activation:?}");
        equals!(&name, &x[..1], &[], move |ops, x| ops.activate(&x[0], activation));
    }
    for (pool, size) in [(Pool::Max, 2), (Pool::Average, 2), (Pool::Average, 3)] {
        let name = format!("{pool:?} pool of {size}");
        equals!(&name, &x[..1], &[], move |ops, x| ops.pool(&x[0], pool, size));
    }
    equals!("add", &x, &[], |ops, x| ops.add(&x[0], &x[1]));
    equals!("concat", &x, &[], |ops, x| ops.concat(&x[0], &x[1]));
    equals!("narrow", &x[..1], &[], |ops, x| ops.narrow(&x[0], 1, 2));
    equals!("scale", &x[..1], &[], |ops, x| ops.scale(&x[0], -1.5));
    equals!("upsample_nearest2x", &x[..1], &[], |ops, x| ops.upsample_nearest2x(&x[0]));
    let heads = [random(1, &[9, 6, 3, 5]), random(2, &[9, 6, 3, 5]), random(3, &[9, 6, 3, 5])];
    for count in [1, 2] {
        let name = format!("attention with {count} heads");
        equals!(&name, &heads, &[], move |ops, x| ops.attention(&x[0], &x[1], &x[2], count));
    }
}

#[test]
fn what_is_no_number_stays_none() {
    for at in 0..4 {
        let mut values = [1.0f32, -2.0, 3.0, 4.0];
        values[at] = f32::NAN;
        let x = [Tensor::from_slice(&values, (1, 1, 2, 2), &Device::Cpu).unwrap()];
        let relu = apply(&x, &BTreeMap::new(), |ops, x| ops.activate(&x[0], Activation::Relu)).unwrap();
        let pool = apply(&x, &BTreeMap::new(), |ops, x| ops.pool(&x[0], Pool::Max, 2)).unwrap();
        for (what, y) in [("ReLU", relu), ("max pool", pool)] {
            assert_eq!(flat(&y).iter().filter(|y| y.is_nan()).count(), 1, "{what} of {values:?}");
        }
    }
}

/// Layers before and after BatchNorm sum over lanes, so whatever it left in lanes without an image would show; running statistics
/// agree too.
#[test]
fn batch_norm_of_a_batch_ignores_empty_lanes() {
    let spec = Conv2d { in_channels: 3, out_channels: 4, kernel: 3, stride: 1, padding: [1; 4] };
    let again = Conv2d { in_channels: 4, ..spec };
    let norm = BatchNorm { channels: 4, eps: 1e-5 };
    fn network<O: Ops>(
        ops: &mut O,
        x: &O::Value,
        [a, b]: [Conv2d; 2],
        norm: BatchNorm,
    ) -> Result<O::Value, O::Error> {
        let y = ops.conv2d(x, "a", a)?;
        let y = ops.batch_norm(&y, "n", norm)?;
        ops.conv2d(&y, "b", b)
    }
    for n in [1, 2, 7, 8, 9, 16, 19, 33] {
        let parameters = [
            ("a.weight", random(2, &[4, 3, 3, 3])),
            ("a.bias", random(3, &[4])),
            ("b.weight", random(4, &[4, 4, 3, 3])),
            ("b.bias", random(5, &[4])),
            ("n.weight", random(6, &[4])),
            ("n.bias", random(7, &[4])),
        ];
        let [fast, slow] = [BatchStatistics::default(), BatchStatistics::default()];
        let (used, also) = (fast.clone(), slow.clone());
        check(
            &format!("{n} images"),
            &[random(1, &[n, 3, 5, 6])],
            &parameters,
            move |ops, x| {
                ops.use_batch_statistics(used.clone());
                network(ops, &x[0], [spec, again], norm)
            },
            |ops, x| {
                ops.use_batch_statistics(also.clone());
                network(ops, &x[0], [spec, again], norm)
            },
        );
        let running = [fast, slow].map(|statistics| {
            let zeros =
                |name: &str| (format!("n.{name}"), Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap());
            let mut running = BTreeMap::from(["running_mean", "running_var"].map(zeros));
            statistics.apply(&mut running).unwrap();
            running.values().flat_map(flat).collect::<Vec<f32>>()
        });
        close(&running[0], &running[1], TOLERANCE).unwrap_or_else(|e| panic!("{n} images, statistics: {e}"));
    }
}

#[test]
fn gradients_stop_where_none_is_wanted() {
    let spec = Conv2d { in_channels: 2, out_channels: 2, kernel: 3, stride: 1, padding: [1; 4] };
    let (x, weight, bias) = (random(1, &[2, 2, 4, 4]), random(2, &[2, 2, 3, 3]), random(3, &[2]));
    let run = |x: &Tensor, weight: &Tensor| {
        let named =
            BTreeMap::from([("l.weight".to_owned(), weight.clone()), ("l.bias".to_owned(), bias.detach())]);
        apply(std::slice::from_ref(x), &named, move |ops, x| ops.conv2d(&x[0], "l", spec)).unwrap()
    };
    let whole = run(&x, &weight).sum_all().unwrap().backward().unwrap();
    let frozen = run(&x, &weight.detach()).sum_all().unwrap().backward().unwrap();
    assert_eq!(flat(whole.get(&x).unwrap()), flat(frozen.get(&x).unwrap()));
    let constant = run(&x.detach(), &weight).sum_all().unwrap().backward().unwrap();
    assert_eq!(flat(whole.get(&weight).unwrap()), flat(constant.get(&weight).unwrap()));
    assert!(!run(&x.detach(), &weight.detach()).track_op());
}

#[test]
fn gradients_do_not_depend_on_the_number_of_threads() {
    let spec = Conv2d { in_channels: 5, out_channels: 19, kernel: 3, stride: 2, padding: [0, 0, 1, 1] };
    let (x, weight, bias) = (random(1, &[70, 5, 9, 9]), random(2, &[19, 5, 3, 3]), random(3, &[19]));
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let named = BTreeMap::from([
                ("l.weight".to_owned(), weight.as_tensor().clone()),
                ("l.bias".to_owned(), bias.as_tensor().clone()),
            ]);
            let y =
                apply(&[x.as_tensor().clone()], &named, move |ops, x| ops.conv2d(&x[0], "l", spec)).unwrap();
            let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            [&x, &weight, &bias].map(|var| flat(grads.get(var).unwrap()))
        })
    };
    assert_eq!(run(1), run(3));
}
