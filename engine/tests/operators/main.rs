//! Operators one by one against plain loops in f64, on graphs written here. tests/engine.rs runs whole files.

mod refusals;
#[path = "../support/mod.rs"]
mod support;

use dmd_engine::message::{Attribute, Graph, Model, Node, Tensor, data_type};
use dmd_engine::{Input, Network, Result};
use support::{floats, int, ints, node, numbers};

fn integers(name: &str, values: &[i64]) -> Tensor {
    Tensor {
        name: name.to_owned(),
        dims: vec![values.len() as i64],
        data_type: data_type::INT64,
        int64_data: values.to_vec(),
        ..Tensor::default()
    }
}

fn text(name: &str, s: &'static str) -> Attribute {
    Attribute { name: name.to_owned(), s: s.into(), ..Attribute::default() }
}

/// Runs the nodes twice on the input `x` (the second run finds the memory of the first): shape and values of `y`.
fn run(
    shape: &[usize],
    x: &[f32],
    nodes: Vec<Node>,
    initializer: Vec<Tensor>,
) -> Result<(Vec<usize>, Vec<f32>)> {
    let graph = Graph { node: nodes, initializer, ..Graph::default() };
    let model = Model { graph: Some(graph), ..Model::default() };
    let network = Network::build(model, &[Input { name: "x", shape }], &["y"])?;
    let mut workspace = network.workspace();
    let first = network.run(&mut workspace, &[x])?[0].to_vec();
    let second = network.run(&mut workspace, &[x])?[0].to_vec();
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&first), bits(&second));
    let shape = network.output_shapes().next().expect("no output").to_vec();
    Ok((shape, second))
}

fn assert_close(what: &str, got: &[f32], expected: &[f64]) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(1.0, |m: f64, v| m.max(v.abs()));
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!(
            (f64::from(*got) - expected).abs() < 2e-6 * largest,
            "{what}, {i}: {got}, expected {expected}"
        );
    }
}

struct Case {
    n: usize,
    input: usize,
    output: usize,
    image: [usize; 2],
    kernel: [usize; 2],
    stride: usize,
    pads: [usize; 4],
}

/// Every product of a convolution: index of `x`, of the weights, and of `y`; for both directions.
fn products(case: &Case, places: [usize; 2], mut f: impl FnMut(usize, usize, usize, usize, usize)) {
    let ([h, w], [kh, kw]) = (case.image, case.kernel);
    for place in 0..places[0] * places[1] {
        for tap in 0..kh * kw {
            let y = (place / places[1] * case.stride + tap / kw).checked_sub(case.pads[0]).filter(|y| *y < h);
            let x = (place % places[1] * case.stride + tap % kw).checked_sub(case.pads[1]).filter(|x| *x < w);
            if let (Some(y), Some(x)) = (y, x) {
                for input in 0..case.input {
                    for output in 0..case.output {
                        f(input, output, tap, y * w + x, place);
                    }
                }
            }
        }
    }
}

#[test]
fn convolutions_are_sums_of_products() -> Result<()> {
    let case = |n, input, output, image, kernel, stride, pads| Case {
        n,
        input,
        output,
        image,
        kernel,
        stride,
        pads,
    };
    let cases = [
        case(1, 8, 8, [28, 28], [3, 3], 1, [1; 4]),
        case(2, 9, 13, [7, 5], [3, 3], 1, [1; 4]),
        case(1, 16, 11, [14, 14], [3, 3], 1, [1; 4]),
        case(1, 32, 8, [32, 32], [3, 3], 1, [1; 4]),
        case(1, 3, 5, [9, 8], [3, 3], 1, [1; 4]),
        case(1, 16, 16, [4, 4], [3, 3], 1, [1; 4]),
        case(2, 5, 3, [9, 11], [3, 3], 2, [0, 0, 1, 1]),
        case(1, 4, 7, [8, 8], [4, 4], 2, [1; 4]),
        case(1, 6, 17, [5, 6], [1, 1], 1, [0; 4]),
        case(1, 2, 1, [5, 3], [1, 2], 1, [0, 1, 0, 2]),
    ];
    for Case { n, input, output, image: [h, w], kernel: [kh, kw], stride, pads } in cases {
        let what = format!("{n}x{input}x{h}x{w} to {output} by {kh}x{kw}/{stride} {pads:?}");
        let case = Case { n, input, output, image: [h, w], kernel: [kh, kw], stride, pads };
        let places = [(h + pads[0] + pads[2] - kh) / stride + 1, (w + pads[1] + pads[3] - kw) / stride + 1];
        let x = numbers(n * input * h * w, 1);
        let weight = numbers(output * input * kh * kw, 2);
        let bias = numbers(output, 3);
        let positions = places[0] * places[1];
        let mut expected = vec![0.0; n * output * positions];
        for image in 0..n {
            for o in 0..output {
                expected[(image * output + o) * positions..][..positions].fill(f64::from(bias[o]));
            }
            products(&case, places, |i, o, tap, at, place| {
                let product = f64::from(x[(image * input + i) * h * w + at])
                    * f64::from(weight[(o * input + i) * kh * kw + tap]);
                expected[(image * output + o) * positions + place] += product;
            });
        }
        let attributes =
            vec![ints("strides", &[stride; 2]), ints("pads", &pads), ints("kernel_shape", &[kh, kw])];
        let conv = Node { attribute: attributes, ..node("Conv", &["x", "w", "b"], "y") };
        let stored = vec![floats("w", &[output, input, kh, kw], &weight), floats("b", &[output], &bias)];
        let (shape, got) = run(&[n, input, h, w], &x, vec![conv], stored)?;
        assert_eq!(shape, [n, output, places[0], places[1]], "{what}");
        assert_close(&what, &got, &expected);
    }
    Ok(())
}

#[test]
fn transposed_convolutions_are_the_same_sums_the_other_way() -> Result<()> {
    for (input, output, [h, w], kernel, stride, pad) in
        [(5, 3, [4, 5], 4, 2, 1), (3, 7, [7, 7], 2, 2, 0), (4, 2, [3, 3], 3, 1, 1)]
    {
        let side = |n: usize| (n - 1) * stride + kernel - 2 * pad;
        let image = [side(h), side(w)];
        // The image of the other direction is the output.
        let case =
            Case { n: 2, input: output, output: input, image, kernel: [kernel; 2], stride, pads: [pad; 4] };
        let x = numbers(2 * input * h * w, 1);
        let weight = numbers(input * output * kernel * kernel, 2);
        let pixels = image[0] * image[1];
        let mut expected = vec![0.0; 2 * output * pixels];
        for n in 0..2 {
            products(&case, [h, w], |o, i, tap, at, place| {
                expected[(n * output + o) * pixels + at] += f64::from(x[(n * input + i) * h * w + place])
                    * f64::from(weight[(i * output + o) * kernel * kernel + tap]);
            });
        }
        let attribute = vec![ints("strides", &[stride; 2]), ints("pads", &[pad; 4])];
        let conv = Node { attribute, ..node("ConvTranspose", &["x", "w"], "y") };
        let stored = vec![floats("w", &[input, output, kernel, kernel], &weight)];
        let (shape, got) = run(&[2, input, h, w], &x, vec![conv], stored)?;
        assert_eq!(shape, [2, output, image[0], image[1]]);
        assert_close(&format!("{h}x{w} by {kernel}/{stride}"), &got, &expected);
    }
    Ok(())
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// The exporter's GroupNorm with SiLU, fused into one step; and not fused, where something else reads a part of it.
#[test]
fn group_norm_is_the_same_alone_and_fused() -> Result<()> {
    let (groups, channels, pixels) = (2, 6, 20);
    let x: Vec<f32> = numbers(2 * channels * pixels, 4).iter().map(|v| 3.0 * v + 0.5).collect();
    let (weight, bias) = (numbers(channels, 5), numbers(channels, 6));
    let size = channels / groups * pixels;
    let mut expected = vec![0.0; x.len()];
    for (x, out) in x.chunks(size).zip(expected.chunks_mut(size)) {
        let mean = x.iter().map(|v| f64::from(*v)).sum::<f64>() / size as f64;
        let variance = x.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / size as f64;
        out.iter_mut().zip(x).for_each(|(o, x)| *o = (f64::from(*x) - mean) / (variance + 1e-5).sqrt());
    }
    let normal = expected.clone();
    for (i, v) in expected.iter_mut().enumerate() {
        let c = i / pixels % channels;
        let y = *v * f64::from(weight[c]) + f64::from(bias[c]);
        *v = y * sigmoid(y);
    }
    let nodes = |output: &str| {
        let epsilon = |f| vec![Attribute { name: "epsilon".to_owned(), f, ..Attribute::default() }];
        vec![
            node("Reshape", &["x", "groups"], "g"),
            Node {
                attribute: epsilon(1e-5),
                ..node("InstanceNormalization", &["g", "ones", "zeros"], "normal")
            },
            node("Reshape", &["normal", "image"], "i"),
            Node { attribute: epsilon(0.0), ..node("BatchNormalization", &["i", "w", "b", "m", "v"], "n") },
            node("Sigmoid", &["n"], "s"),
            node("Mul", &["n", "s"], output),
        ]
    };
    let stored = || {
        vec![
            integers("groups", &[0, groups as i64, -1]),
            integers("image", &[0, channels as i64, 4, 5]),
            floats("ones", &[groups], &vec![1.0; groups]),
            floats("zeros", &[groups], &vec![0.0; groups]),
            floats("w", &[channels], &weight),
            floats("b", &[channels], &bias),
            floats("m", &[channels], &vec![0.0; channels]),
            floats("v", &[channels], &vec![1.0; channels]),
        ]
    };
    let shape = [2, channels, 4, 5];
    assert_close("fused", &run(&shape, &x, nodes("y"), stored())?.1, &expected);

    // Whatever else reads one of these values, before or after the last of these nodes, and under whatever name.
    let all = stored();
    let affine: Vec<f64> = (normal.iter().enumerate())
        .map(|(i, v)| v * f64::from(weight[i / pixels % channels]) + f64::from(bias[i / pixels % channels]))
        .collect();
    let gate: Vec<f64> = affine.iter().map(|v| sigmoid(*v)).collect();
    for (value, values) in [("normal", &normal), ("i", &normal), ("n", &affine), ("s", &gate)] {
        let made = nodes("silu").iter().position(|node| node.output[0] == value).expect("a node") + 1;
        for at in made..=nodes("silu").len() {
            for alias in [None, Some("Cast"), Some("Identity")] {
                let mut graph = nodes("silu");
                graph.insert(at, node("Neg", &[alias.map_or(value, |_| "alias")], "negative"));
                graph.push(node("Reshape", &["negative", "image"], "other"));
                graph.push(node("Add", &["silu", "other"], "y"));
                if let Some(alias) = alias {
                    for reader in &mut graph[made..at] {
                        let names = reader.input.iter_mut().filter(|name| *name == value);
                        names.for_each(|name| *name = "alias".to_owned());
                    }
                    graph.insert(made, node(alias, &[value], "alias"));
                    graph[made].attribute = vec![int("to", i64::from(data_type::FLOAT))];
                }
                let sum: Vec<f64> = expected.iter().zip(values).map(|(a, b)| a - b).collect();
                let what = format!("{value} read at {at}, under another name: {alias:?}");
                assert_close(&what, &run(&shape, &x, graph, all.clone())?.1, &sum);
            }
        }
    }
    Ok(())
}

#[test]
fn functions_of_one_value_are_what_they_are_called() -> Result<()> {
    let x: Vec<f32> = (-400..400).map(|i| i as f32 / 20.0).collect();
    let erf = |x: f64| {
        let step = x / 2000.0;
        let f = |i: i32| (-(f64::from(i) * step).powi(2)).exp();
        let inner: f64 = (1..2000).map(|i| f(i) * if i % 2 == 0 { 2.0 } else { 4.0 }).sum();
        (f(0) + inner + f(2000)) * step / 3.0 * std::f64::consts::FRAC_2_SQRT_PI
    };
    let functions: [(&str, &dyn Fn(f64) -> f64); 9] = [
        ("Sigmoid", &sigmoid),
        ("Relu", &|x| x.max(0.0)),
        ("Tanh", &f64::tanh),
        ("Softplus", &|x| x.exp().ln_1p()),
        ("Erf", &erf),
        ("Sin", &f64::sin),
        ("Cos", &f64::cos),
        ("Neg", &|x| -x),
        ("Floor", &f64::floor),
    ];
    for (name, f) in functions {
        let expected: Vec<f64> = x.iter().map(|&x| f(f64::from(x))).collect();
        assert_close(name, &run(&[800], &x, vec![node(name, &["x"], "y")], vec![])?.1, &expected);
    }
    let bounds = vec![floats("low", &[], &[-0.5]), floats("high", &[], &[2.0])];
    let got = run(&[800], &x, vec![node("Clip", &["x", "low", "high"], "y")], bounds)?.1;
    assert!(got.iter().zip(&x).all(|(y, x)| *y == x.clamp(-0.5, 2.0)));
    Ok(())
}

#[test]
fn operands_are_repeated_as_onnx_says() -> Result<()> {
    let shapes: [(&[usize], &[usize]); 7] = [
        (&[2, 3, 4], &[2, 3, 4]),
        (&[2, 3, 4], &[]),
        (&[2, 3, 4], &[4]),
        (&[2, 3, 4], &[3, 1]),
        (&[2, 3, 4], &[2, 1, 4]),
        (&[3, 1], &[1, 5]),
        (&[4], &[2, 3, 4]),
    ];
    for (a_shape, b_shape) in shapes {
        for (op, f) in [
            ("Add", (|a, b| a + b) as fn(f64, f64) -> f64),
            ("Sub", |a, b| a - b),
            ("Mul", |a, b| a * b),
            ("Div", |a, b| a / b),
        ] {
            for swapped in [false, true] {
                let x = numbers(a_shape.iter().product(), 7);
                let b: Vec<f32> = numbers(b_shape.iter().product(), 8).iter().map(|v| v + 2.0).collect();
                let x: Vec<f32> = x.iter().map(|v| v + 2.0).collect();
                let rank = a_shape.len().max(b_shape.len());
                let wide = |shape: &[usize]| [vec![1; rank - shape.len()], shape.to_vec()].concat();
                let (wide_a, wide_b) = (wide(a_shape), wide(b_shape));
                let out: Vec<usize> = wide_a.iter().zip(&wide_b).map(|(a, b)| *a.max(b)).collect();
                let at = |shape: &[usize], mut i: usize| {
                    let (mut at, mut step) = (0, 1);
                    for axis in (0..rank).rev() {
                        at += if shape[axis] == 1 { 0 } else { i % out[axis] * step };
                        i /= out[axis];
                        step *= shape[axis];
                    }
                    at
                };
                let expected: Vec<f64> = (0..out.iter().product())
                    .map(|i| {
                        let (a, b) = (f64::from(x[at(&wide_a, i)]), f64::from(b[at(&wide_b, i)]));
                        if swapped { f(b, a) } else { f(a, b) }
                    })
                    .collect();
                let inputs = if swapped { ["b", "x"] } else { ["x", "b"] };
                let (shape, got) =
                    run(a_shape, &x, vec![node(op, &inputs, "y")], vec![floats("b", b_shape, &b)])?;
                assert_eq!(shape, out);
                assert_close(&format!("{op} {a_shape:?} {b_shape:?}"), &got, &expected);
            }
        }
    }
    Ok(())
}

#[test]
fn attention_is_a_weighted_mean_of_values() -> Result<()> {
    let (d, pixels) = (5, 12);
    let x = numbers(2 * d * pixels, 9);
    let last = |name: &str, inputs: &[&str], output: &str| Node {
        attribute: vec![ints("perm", &[0, 2, 1])],
        ..node(name, inputs, output)
    };
    let nodes = vec![
        last("Transpose", &["x"], "rows"),
        node("MatMul", &["rows", "x"], "scores"),
        Node { attribute: vec![int("axis", -1)], ..node("Softmax", &["scores"], "p") },
        last("Transpose", &["p"], "columns"),
        node("MatMul", &["x", "columns"], "y"),
    ];
    let mut expected = vec![0.0; x.len()];
    for (x, out) in x.chunks(d * pixels).zip(expected.chunks_mut(d * pixels)) {
        let v = |c: usize, i: usize| f64::from(x[c * pixels + i]);
        for i in 0..pixels {
            let weights: Vec<f64> =
                (0..pixels).map(|j| (0..d).map(|c| v(c, i) * v(c, j)).sum::<f64>().exp()).collect();
            let total: f64 = weights.iter().sum();
            for c in 0..d {
                out[c * pixels + i] = (0..pixels).map(|j| weights[j] / total * v(c, j)).sum();
            }
        }
    }
    let (shape, got) = run(&[2, d, pixels], &x, nodes, vec![])?;
    assert_eq!(shape, [2, d, pixels]);
    assert_close("attention", &got, &expected);
    Ok(())
}

#[test]
fn values_are_moved_where_onnx_says() -> Result<()> {
    let x: Vec<f32> = (0..2 * 3 * 4 * 6).map(|i| i as f32).collect();
    let shape = [2, 3, 4, 6];
    let at = |[a, b, c, d]: [usize; 4]| x[((a * 3 + b) * 4 + c) * 6 + d];
    let check =
        |nodes: Vec<Node>, stored: Vec<Tensor>, wanted: [usize; 4], from: &dyn Fn([usize; 4]) -> f32| {
            let (got_shape, got) = run(&shape, &x, nodes, stored)?;
            assert_eq!(got_shape, wanted);
            let [a, b, c, d] = wanted;
            let index = (0..a * b * c * d).map(|i| [i / d / c / b, i / d / c % b, i / d % c, i % d]);
            assert_eq!(got, index.map(from).collect::<Vec<_>>());
            Result::Ok(())
        };
    let turned = Node { attribute: vec![ints("perm", &[0, 2, 3, 1])], ..node("Transpose", &["x"], "y") };
    check(vec![turned], vec![], [2, 4, 6, 3], &|[a, c, d, b]| at([a, b, c, d]))?;
    let part = node("Slice", &["x", "from", "to", "axes"], "y");
    let range = vec![integers("from", &[1]), integers("to", &[i64::MAX]), integers("axes", &[1])];
    check(vec![part], range, [2, 2, 4, 6], &|[a, b, c, d]| at([a, b + 1, c, d]))?;
    let twice = Node { attribute: vec![int("axis", 1)], ..node("Concat", &["x", "n", "x"], "y") };
    check(vec![node("Neg", &["x"], "n"), twice], vec![], [2, 9, 4, 6], &|[a, b, c, d]| {
        let sign = if b / 3 == 1 { -1.0 } else { 1.0 };
        sign * at([a, b % 3, c, d])
    })?;
    let modes =
        [("mode", "nearest"), ("coordinate_transformation_mode", "asymmetric"), ("nearest_mode", "floor")];
    let attribute = modes.iter().map(|(name, value)| text(name, value)).collect();
    let enlarged = Node { attribute, ..node("Resize", &["x", "", "scales"], "y") };
    let scales = vec![floats("scales", &[4], &[1.0, 1.0, 2.0, 3.0])];
    check(vec![enlarged], scales, [2, 3, 8, 18], &|[a, b, c, d]| at([a, b, c / 2, d / 3]))?;
    let windows = || vec![ints("kernel_shape", &[2, 2]), ints("strides", &[2, 2])];
    let largest = Node { attribute: windows(), ..node("MaxPool", &["x"], "y") };
    check(vec![largest], vec![], [2, 3, 2, 3], &|[a, b, c, d]| at([a, b, 2 * c + 1, 2 * d + 1]))?;
    let mean = Node { attribute: windows(), ..node("AveragePool", &["x"], "y") };
    check(vec![mean], vec![], [2, 3, 2, 3], &|[a, b, c, d]| at([a, b, 2 * c, 2 * d]) + 3.5)?;
    Ok(())
}

#[test]
fn rows_are_looked_up_and_products_with_weights_are_right() -> Result<()> {
    let table = numbers(5 * 3, 10);
    let stored = || vec![floats("table", &[5, 3], &table)];
    let lookup = || vec![node("Gather", &["table", "x"], "y")];
    let (shape, got) = run(&[4], &[0.0, 4.0, -1.0, 2.0], lookup(), stored())?;
    assert_eq!(shape, [4, 3]);
    assert_eq!(got, [&table[..3], &table[12..], &table[12..], &table[6..9]].concat());
    let refused = run(&[1], &[5.0], lookup(), stored()).expect_err("row 5 of 5 was found").to_string();
    assert_eq!(refused, "node `y`: got index 5, expected 0 to 4");

    let (weight, bias, x) = (numbers(7 * 37, 11), numbers(7, 12), numbers(2 * 37, 13));
    let expected: Vec<f64> = (0..14)
        .map(|i| {
            let products = (0..37).map(|k| f64::from(x[i / 7 * 37 + k]) * f64::from(weight[i % 7 * 37 + k]));
            f64::from(bias[i % 7]) + products.sum::<f64>()
        })
        .collect();
    let gemm = Node { attribute: vec![int("transB", 1)], ..node("Gemm", &["x", "w", "b"], "y") };
    let stored = vec![floats("w", &[7, 37], &weight), floats("b", &[7], &bias)];
    assert_close("Gemm", &run(&[2, 37], &x, vec![gemm], stored)?.1, &expected);
    let turned: Vec<f32> = (0..7 * 37).map(|i| weight[i % 7 * 37 + i / 7]).collect();
    let stored = vec![floats("w", &[37, 7], &turned), floats("b", &[7], &bias)];
    let nodes = vec![node("MatMul", &["x", "w"], "p"), node("Add", &["p", "b"], "y")];
    assert_close("MatMul", &run(&[2, 37], &x, nodes, stored)?.1, &expected);
    Ok(())
}

#[test]
fn what_is_no_number_stays_none() -> Result<()> {
    let pool = Node { attribute: vec![ints("kernel_shape", &[2, 2])], ..node("MaxPool", &["x"], "y") };
    let stored = vec![floats("low", &[], &[-1.0]), floats("high", &[], &[1.0])];
    for node in [node("Relu", &["x"], "y"), node("Clip", &["x", "low", "high"], "y"), pool] {
        for at in 0..4 {
            let mut x = [1.0, 2.0, 3.0, 4.0];
            x[at] = f32::NAN;
            let y = run(&[1, 1, 2, 2], &x, vec![node.clone()], stored.clone())?.1;
            assert_eq!(y.iter().filter(|y| y.is_nan()).count(), 1, "{} {y:?}", node.op_type);
        }
    }
    Ok(())
}
