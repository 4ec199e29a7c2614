//! `cargo bench -p dmd-distill --bench operations`: every operation of the CPU engine, forward and with its gradients, on
//! batches of 64, and a whole update of distribution matching distillation of the bundled base.

use std::collections::BTreeMap;
use std::hint::black_box;

use candle_core::{Device, Tensor, Var};
use criterion::{Criterion, criterion_group};
use dmd_core::net::{
    Activation, BatchNorm, Conv2d, ConvTranspose2d, Embedding, GroupNorm, Linear, Ops, Pool,
    TimestepEmbedding,
};
use dmd_core::noise;
use dmd_distill::base;
use dmd_distill::cpu::{self, CpuOps, Value};
use dmd_distill::device::quiet_candle_threads;
use dmd_distill::distillation::{Distillation, Material, Start};
use dmd_distill::ops::Error;
use dmd_distill::options::Recipe;
use dmd_distill::pairs;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const BATCH: usize = 64;

fn random(stream: u64, shape: &[usize]) -> Tensor {
    let mut data = vec![0.0; shape.iter().product()];
    noise::standard_normal(1, stream, &mut data);
    Tensor::from_vec(data, shape, &Device::Cpu).expect("a shape that fits")
}

/// Times one operation on images `[64, c, side, side]`, without gradients and with all of them.
fn operation(
    criterion: &mut Criterion,
    name: &str,
    inputs: &[[usize; 2]],
    parameters: &[(&str, &[usize])],
    run: impl Fn(&mut CpuOps, &[Value]) -> Result<Value, Error> + Copy + Send + 'static,
) {
    let mut group = criterion.benchmark_group(name);
    let images: Vec<Tensor> =
        (0..).zip(inputs).map(|(i, [c, side])| random(i, &[BATCH, *c, *side, *side])).collect();
    let weights: BTreeMap<String, Tensor> = (100..)
        .zip(parameters)
        .map(|(i, (name, shape))| {
            let value = random(i, shape);
            let value = if name.ends_with("var") { value.abs() } else { Ok(value) };
            (format!("layer.{name}"), value.expect("a value"))
        })
        .collect();
    group.bench_function("forward", |bench| {
        bench.iter(|| black_box(cpu::apply(&images, &weights, run).expect("a result")));
    });
    if inputs.is_empty() && parameters.is_empty() {
        return group.finish();
    }
    let var = |t: &Tensor| Var::from_tensor(t).expect("a variable").as_tensor().clone();
    let tracked: Vec<Tensor> = images.iter().map(var).collect();
    let trained = weights.iter().map(|(name, t)| (name.clone(), var(t))).collect();
    group.bench_function("forward and gradients", |bench| {
        bench.iter(|| {
            let y = cpu::apply(&tracked, &trained, run).expect("a result");
            black_box(y.sum_all().and_then(|sum| sum.backward()).expect("gradients"));
        });
    });
    group.finish();
}

fn operations(c: &mut Criterion) {
    let conv = |inputs, outputs, kernel, stride, padding| Conv2d {
        in_channels: inputs,
        out_channels: outputs,
        kernel,
        stride,
        padding: [padding; 4],
    };
    for (inputs, outputs, side) in [(16, 16, 28), (32, 32, 28), (64, 64, 14), (96, 96, 16)] {
        let spec = conv(inputs, outputs, 3, 1, 1);
        let shape = [outputs, inputs, 3, 3];
        let parameters = [("weight", &shape[..]), ("bias", &shape[..1])];
        let name = format!("conv2d 3x3, {inputs} to {outputs}, {side}x{side}");
        operation(c, &name, &[[inputs, side]], &parameters, move |ops, x| ops.conv2d(&x[0], "layer", spec));
    }
    let spec = conv(32, 32, 3, 2, 1);
    let parameters = [("weight", &[32, 32, 3, 3][..]), ("bias", &[32][..])];
    operation(c, "conv2d stride 2, 28x28", &[[32, 28]], &parameters, move |ops, x| {
        ops.conv2d(&x[0], "layer", spec)
    });
    let spec = ConvTranspose2d { in_channels: 32, out_channels: 32, kernel: 4, stride: 2, padding: 1 };
    let parameters = [("weight", &[32, 32, 4, 4][..]), ("bias", &[32][..])];
    operation(c, "conv_transpose2d 4x4 stride 2, 14x14", &[[32, 14]], &parameters, move |ops, x| {
        ops.conv_transpose2d(&x[0], "layer", spec)
    });
    let parameters = [("weight", &[32, 32][..]), ("bias", &[32][..])];
    operation(c, "pointwise, 28x28", &[[32, 28]], &parameters, |ops, x| {
        ops.pointwise(&x[0], "layer", Linear { in_features: 32, out_features: 32 })
    });
    let parameters = [("weight", &[64, 256][..]), ("bias", &[64][..])];
    operation(c, "linear, 256 to 64", &[[256, 1]], &parameters, |ops, x| {
        ops.linear(&x[0], "layer", Linear { in_features: 256, out_features: 64 })
    });
    let table = Embedding { rows: 11, features: 256, frozen: false };
    operation(c, "embedding, 11 rows of 256", &[], &[("weight", &[11, 256][..])], move |ops, _| {
        let rows: Vec<f32> = (0..BATCH).map(|i| (i % table.rows) as f32).collect();
        let rows = ops.numbers(&rows);
        ops.embedding(&rows, "layer", table)
    });
    let spec = TimestepEmbedding { features: 64, flip_sin_to_cos: true, freq_shift: 0.0 };
    operation(c, "timestep_embedding, 64 features", &[], &[], move |ops, _| {
        let t: Vec<f32> = (0..BATCH).map(|i| (i * 15) as f32).collect();
        let t = ops.numbers(&t);
        ops.timestep_embedding(&t, spec)
    });
    let parameters = [("weight", &[32][..]), ("bias", &[32][..])];
    operation(c, "group_norm and SiLU, 28x28", &[[32, 28]], &parameters, |ops, x| {
        ops.group_norm(&x[0], "layer", GroupNorm { channels: 32, groups: 8, eps: 1e-5, silu: true })
    });
    let statistics = [("running_mean", &[32][..]), ("running_var", &[32][..])];
    let parameters = [parameters, statistics].concat();
    operation(c, "batch_norm, 28x28", &[[32, 28]], &parameters, |ops, x| {
        ops.batch_norm(&x[0], "layer", BatchNorm { channels: 32, eps: 1e-5 })
    });
    for activation in [Activation::Silu, Activation::Gelu, Activation::Relu, Activation::Mish] {
        operation(c, &format!("{activation:?}, 28x28"), &[[32, 28]], &[], move |ops, x| {
            ops.activate(&x[0], activation)
        });
    }
    for pool in [Pool::Max, Pool::Average] {
        operation(c, &format!("{pool:?} pool, 28x28"), &[[32, 28]], &[], move |ops, x| {
            ops.pool(&x[0], pool, 2)
        });
    }
    operation(c, "upsample_nearest2x, 14x14", &[[32, 14]], &[], |ops, x| ops.upsample_nearest2x(&x[0]));
    operation(c, "concat, 28x28", &[[32, 28], [32, 28]], &[], |ops, x| ops.concat(&x[0], &x[1]));
    operation(c, "narrow to half, 28x28", &[[32, 28]], &[], |ops, x| ops.narrow(&x[0], 16, 16));
    operation(c, "scale, 28x28", &[[32, 28]], &[], |ops, x| ops.scale(&x[0], 0.5));
    operation(c, "add_bias, 28x28", &[[32, 28], [32, 1]], &[], |ops, x| ops.add_bias(&x[0], &x[1]));
    operation(c, "scale_channels, 28x28", &[[32, 28], [32, 1]], &[], |ops, x| {
        ops.scale_channels(&x[0], &x[1])
    });
    operation(c, "add, 28x28", &[[32, 28], [32, 28]], &[], |ops, x| ops.add(&x[0], &x[1]));
    operation(c, "attention, 64 channels, 7x7", &[[64, 7], [64, 7], [64, 7]], &[], |ops, x| {
        ops.attention(&x[0], &x[1], &x[2], 1)
    });
    operation(c, "attention, 96 channels, 16x16", &[[96, 16], [96, 16], [96, 16]], &[], |ops, x| {
        ops.attention(&x[0], &x[1], &x[2], 1)
    });
}

fn dmd_update(c: &mut Criterion) {
    let name = "ddpm-fashion";
    let checkpoint = base::load(name).expect("the bundled base");
    let count = Some(BATCH);
    let recipe = Recipe {
        batch: count,
        pairs: count,
        pair_steps: Some(2),
        fake_updates: Some(1),
        ..Recipe::default()
    };
    let options = recipe.resolve(name, &checkpoint).expect("options");
    let folder = tempfile::tempdir().expect("a folder");
    let pairs = pairs::prepare(folder.path(), &options.pairs(&checkpoint), &checkpoint, BATCH, &Device::Cpu)
        .expect("pairs");
    let material = Material { pairs: Some(pairs), real: None };
    let mut work = Distillation::new(&options, &checkpoint, Start::Base, &Device::Cpu).expect("networks");
    let mut step = 0;
    c.bench_function("DMD update of ddpm-fashion, batch 64", |bench| {
        bench.iter(|| {
            step += 1;
            work.update(step, &material).expect("an update").dm
        });
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = operations, dmd_update
}

fn main() {
    quiet_candle_threads();
    benches();
    Criterion::default().configure_from_args().final_summary();
}
