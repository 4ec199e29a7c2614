//! The CPU engine against compositions of candle operations: values and gradients, whatever the sizes.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use dmd_core::compare::{Tolerance, close};
use dmd_core::net::{BatchNorm, Conv2d, GroupNorm, Ops};
use dmd_core::noise;

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

/// Compares values and gradients of every argument under a random cotangent; the first input is also used directly,
/// so that accumulated gradients are covered.
fn check(
    what: &str,
    inputs: &[Var],
    parameters: &[(&str, Var)],
    fast: impl Fn(&mut CpuOps, &[Value]) -> Result<Value, Error> + Send + 'static,
    slow: impl Fn(&mut CandleOps, &[Tensor]) -> Result<Tensor, Error>,
) {
    let tensors: Vec<Tensor> = inputs.iter().map(|v| v.as_tensor().clone()).collect();
    let named: BTreeMap<String, Tensor> =
        parameters.iter().map(|(name, v)| ((*name).to_owned(), v.as_tensor().clone())).collect();
    let y = apply(&tensors, &named, fast).unwrap();
    let expected = slow(&mut CandleOps::new(&named, &Device::Cpu), &tensors).unwrap();
    close(&flat(&y), &flat(&expected), TOLERANCE).unwrap_or_else(|e| panic!("{what}: {e}"));
    let cotangent = random(99, y.dims());
    let gradients = |y: &Tensor| {
        let extra = (tensors[0].sqr().unwrap().sum_all().unwrap() * 0.25).unwrap();
        ((y * cotangent.as_tensor()).unwrap().sum_all().unwrap() + extra).unwrap().backward().unwrap()
    };
    let (got, expected) = (gradients(&y), gradients(&expected));
    for (i, var) in inputs.iter().chain(parameters.iter().map(|(_, v)| v)).enumerate() {
        let (got, expected) = (got.get(var).unwrap(), expected.get(var).unwrap());
        close(&flat(got), &flat(expected), TOLERANCE).unwrap_or_else(|e| panic!("{what}, gradient {i}: {e}"));
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
