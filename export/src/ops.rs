//! [`Ops`] by partial evaluation: what does not depend on the image is computed now, the rest becomes operators.
//!
//! A bias that follows a convolution merges into the convolution's own. Only operators of ONNX's default domain, opset
//! 18, in forms that onnxruntime and tract both run; `docs/onnx.md` lists them. No reading or writing of files.

use dmd_core::net::{
    Activation, BatchNorm, Conv2d, ConvTranspose2d, Embedding, GroupNorm, Linear, Ops, Pool,
    TimestepEmbedding,
};

use tract_onnx::pb::tensor_proto::DataType;

use crate::graph::{Attribute, Data, Edge, Node};
use crate::partial::{Exporter, Flow, Known, Value, flow, wrong_shape};
use crate::{Array, Error, Result};

impl Ops for Exporter<'_> {
    type Value = Value;
    type Error = Error;

    fn timestep(&mut self, t: f64) -> Result<Value> {
        Ok(Value::Const(Known { array: self.evaluate.timestep(t)?, name: "timestep".into() }))
    }

    fn timestep_embedding(&mut self, t: &Value, spec: TimestepEmbedding) -> Result<Value> {
        let name = "timestep_embedding";
        if let Some(known) = self.fold(name, &[t], |e, v| e.timestep_embedding(v[0], spec))? {
            return Ok(known);
        }
        let t = self.lift(t)?;
        let frequencies: Vec<f32> = spec.frequencies().iter().map(|&f| f as f32).collect();
        let frequencies = Array::new(&[1, frequencies.len()], frequencies)?;
        let frequencies = self.graph.constant("frequencies", Data::Float(frequencies));
        let last = self.sizes("axes", &[1]);
        let column = self.graph.node("Unsqueeze", &format!("{name}.t"), &[t.edge, last]);
        let angle = self.graph.node("Mul", &format!("{name}.angle"), &[column, frequencies]);
        let sin = self.graph.node("Sin", &format!("{name}.sin"), &[angle]);
        let cos = self.graph.node("Cos", &format!("{name}.cos"), &[angle]);
        let inputs = if spec.flip_sin_to_cos { vec![cos, sin] } else { vec![sin, cos] };
        let attributes = vec![("axis", Attribute::Int(1))];
        let edge = self.graph.push(Node { op: "Concat", name: name.into(), inputs, attributes, macs: 0 });
        Ok(flow(edge, &[spec.features]))
    }

    fn embedding(&mut self, index: &Value, name: &str, spec: Embedding) -> Result<Value> {
        let weight = format!("{name}.weight");
        if let Some(known) = self.fold(&weight, &[index], |e, v| e.embedding(v[0], name, spec))? {
            return Ok(known);
        }
        let (index, shape) = (self.lift(index)?, [spec.rows, spec.features]);
        let table = self.parameter(&weight, &shape, &shape)?;
        let whole = Node {
            op: "Cast",
            name: format!("{name}.index"),
            inputs: vec![index.edge],
            attributes: vec![("to", Attribute::Int(DataType::Int64 as i64))],
            macs: 0,
        };
        let whole = self.graph.push(whole);
        Ok(flow(self.graph.node("Gather", name, &[table, whole]), &shape[1..]))
    }

    fn unused(&mut self, name: &str, shape: &[usize]) {
        self.evaluate.unused(name, shape);
    }

    fn linear(&mut self, x: &Value, name: &str, spec: Linear) -> Result<Value> {
        if let Some(known) = self.fold(name, &[x], |e, v| e.linear(v[0], name, spec))? {
            return Ok(known);
        }
        let (x, Linear { in_features, out_features }) = (self.lift(x)?, spec);
        if x.shape != [in_features] {
            return Err(wrong_shape(name, &x.shape, &format!("[{in_features}]")));
        }
        let shape = [out_features, in_features];
        let weight = self.parameter(&format!("{name}.weight"), &shape, &shape)?;
        let bias = self.parameter(&format!("{name}.bias"), &shape[..1], &shape[..1])?;
        let edge = self.graph.push(Node {
            op: "Gemm",
            name: name.into(),
            inputs: vec![x.edge, weight, bias],
            attributes: vec![("transB", Attribute::Int(1))],
            macs: (in_features * out_features) as u64,
        });
        Ok(flow(edge, &[out_features]))
    }

    fn pointwise(&mut self, x: &Value, name: &str, spec: Linear) -> Result<Value> {
        if let Some(known) = self.fold(name, &[x], |e, v| e.pointwise(v[0], name, spec))? {
            return Ok(known);
        }
        let x = self.lift(x)?;
        let Linear { in_features: in_channels, out_features: out_channels } = spec;
        let conv = Conv2d { in_channels, out_channels, kernel: 1, stride: 1, padding: [0; 4] };
        self.convolution(&x, name, conv, &[out_channels, in_channels])
    }

    fn conv2d(&mut self, x: &Value, name: &str, spec: Conv2d) -> Result<Value> {
        if let Some(known) = self.fold(name, &[x], |e, v| e.conv2d(v[0], name, spec))? {
            return Ok(known);
        }
        let x = self.lift(x)?;
        self.convolution(&x, name, spec, &[spec.out_channels, spec.in_channels, spec.kernel, spec.kernel])
    }

    fn group_norm(&mut self, x: &Value, name: &str, spec: GroupNorm) -> Result<Value> {
        if let Some(known) = self.fold(name, &[x], |e, v| e.group_norm(v[0], name, spec))? {
            return Ok(known);
        }
        let (x, channels) = (self.lift(x)?, spec.channels);
        let [c, h, w] = match x.shape[..] {
            [c, h, w] if c == channels => [c as i64, h as i64, w as i64],
            _ => return Err(wrong_shape(name, &x.shape, &format!("[{channels}, h, w]"))),
        };
        let ones = self.graph.shared("ones", Data::Float(Array::filled(&[spec.groups], 1.0)));
        let zeros = self.graph.shared("zeros", Data::Float(Array::filled(&[spec.groups], 0.0)));
        let groups = self.reshape(&format!("{name}.groups"), x.edge, &[0, spec.groups as i64, -1]);
        let normal = self.graph.push(Node {
            op: "InstanceNormalization",
            name: format!("{name}.normal"),
            inputs: vec![groups, ones, zeros],
            attributes: vec![("epsilon", Attribute::Float(spec.eps as f32))],
            macs: 0,
        });
        let image = self.reshape(&format!("{name}.image"), normal, &[0, c, h, w]);
        let weight = self.parameter(&format!("{name}.weight"), &[channels], &[channels])?;
        let bias = self.parameter(&format!("{name}.bias"), &[channels], &[channels])?;
        let mean = self.graph.shared("mean", Data::Float(Array::filled(&[channels], 0.0)));
        let variance = self.graph.shared("variance", Data::Float(Array::filled(&[channels], 1.0)));
        let edge = self.graph.push(Node {
            op: "BatchNormalization",
            name: name.into(),
            inputs: vec![image, weight, bias, mean, variance],
            attributes: vec![("epsilon", Attribute::Float(0.0))],
            macs: 0,
        });
        let y = Flow { edge, shape: x.shape };
        Ok(if spec.silu { self.silu_of(&y, name) } else { Value::Flow(y) })
    }

    fn conv_transpose2d(&mut self, x: &Value, name: &str, spec: ConvTranspose2d) -> Result<Value> {
        if let Some(known) = self.fold(name, &[x], |e, v| e.conv_transpose2d(v[0], name, spec))? {
            return Ok(known);
        }
        let (x, ConvTranspose2d { in_channels, out_channels, kernel, stride, padding }) =
            (self.lift(x)?, spec);
        let (h, w) = match x.shape[..] {
            [c, h, w] if c == in_channels => (h, w),
            _ => return Err(wrong_shape(name, &x.shape, &format!("[{in_channels}, h, w]"))),
        };
        let side = |h| spec.output(h).ok_or_else(|| wrong_shape(name, &x.shape, "a larger image"));
        let shape = [in_channels, out_channels, kernel, kernel];
        let weight = self.parameter(&format!("{name}.weight"), &shape, &shape)?;
        let bias = self.parameter(&format!("{name}.bias"), &shape[1..2], &shape[1..2])?;
        let edge = self.graph.push(Node {
            op: "ConvTranspose",
            name: name.into(),
            inputs: vec![x.edge, weight, bias],
            attributes: vec![
                ("kernel_shape", Attribute::Ints(vec![kernel as i64; 2])),
                ("pads", Attribute::Ints(vec![padding as i64; 4])),
                ("strides", Attribute::Ints(vec![stride as i64; 2])),
            ],
            macs: (shape.iter().product::<usize>() * h * w) as u64,
        });
        Ok(flow(edge, &[out_channels, side(h)?, side(w)?]))
    }

    /// Merges into the convolution before it, where there is one.
    fn batch_norm(&mut self, x: &Value, name: &str, spec: BatchNorm) -> Result<Value> {
        if let Some(known) = self.fold(name, &[x], |e, v| e.batch_norm(v[0], name, spec))? {
            return Ok(known);
        }
        let x = self.lift(x)?;
        let (scale, shift) = self.evaluate.fixed_norm(name, spec)?;
        if let Some((mut conv, bias_name, bias)) = self.convolution_of(x.edge)
            && let Some((weight_name, Data::Float(weight))) = self.graph.value(conv.inputs[1]).cloned()
        {
            let row = weight.data.len() / scale.len();
            let data = weight.data.iter().enumerate().map(|(i, &w)| (f64::from(w) * scale[i / row]) as f32);
            let weight = Array::new(&weight.shape, data.collect())?;
            let bias =
                bias.data.iter().zip(&scale).zip(&shift).map(|((&b, s), shift)| f64::from(b) * s + shift);
            let bias = Array::new(&[scale.len()], bias.map(|b| b as f32).collect())?;
            conv.inputs[1] = self.graph.constant(&weight_name, Data::Float(weight));
            conv.inputs[2] = self.graph.constant(&bias_name, Data::Float(bias));
            return Ok(flow(self.graph.push(conv), &x.shape));
        }
        let mut image = |suffix: &str, values: Vec<f64>| -> Result<Edge> {
            let array = Array::new(&[values.len(), 1, 1], values.iter().map(|&v| v as f32).collect())?;
            Ok(self.graph.constant(&format!("{name}.{suffix}"), Data::Float(array)))
        };
        let (scale, shift) = (image("scale", scale)?, image("shift", shift)?);
        let scaled = self.graph.node("Mul", &format!("{name}.scaled"), &[x.edge, scale]);
        Ok(flow(self.graph.node("Add", name, &[scaled, shift]), &x.shape))
    }

    fn activate(&mut self, x: &Value, activation: Activation) -> Result<Value> {
        if let Some(known) = self.fold("activation", &[x], |e, v| e.activate(v[0], activation))? {
            return Ok(known);
        }
        let x = self.lift(x)?;
        let name = self.graph.producer(x.edge).map_or("input".to_owned(), |node| node.name.clone());
        let edge = match activation {
            Activation::Silu => return Ok(self.silu_of(&x, &name)),
            Activation::Relu => self.graph.node("Relu", &format!("{name}.relu"), &[x.edge]),
            Activation::Mish => {
                let softplus = self.graph.node("Softplus", &format!("{name}.softplus"), &[x.edge]);
                let tanh = self.graph.node("Tanh", &format!("{name}.tanh"), &[softplus]);
                self.graph.node("Mul", &format!("{name}.mish"), &[x.edge, tanh])
            }
            Activation::Gelu => {
                let (root, one, half) = (self.number(0.5_f64.sqrt()), self.number(1.0), self.number(0.5));
                let scaled = self.graph.node("Mul", &format!("{name}.scaled"), &[x.edge, root]);
                let erf = self.graph.node("Erf", &format!("{name}.erf"), &[scaled]);
                let above = self.graph.node("Add", &format!("{name}.above"), &[erf, one]);
                let share = self.graph.node("Mul", &format!("{name}.share"), &[above, half]);
                self.graph.node("Mul", &format!("{name}.gelu"), &[x.edge, share])
            }
        };
        Ok(flow(edge, &x.shape))
    }

    fn pool(&mut self, x: &Value, pool: Pool, size: usize) -> Result<Value> {
        if let Some(known) = self.fold("pool", &[x], |e, v| e.pool(v[0], pool, size))? {
            return Ok(known);
        }
        let x = self.lift(x)?;
        let [c, h, w] = x.shape[..] else { return Err(wrong_shape("pool", &x.shape, "[c, h, w]")) };
        let op = match pool {
            Pool::Max => "MaxPool",
            Pool::Average => "AveragePool",
        };
        let sides = || Attribute::Ints(vec![size as i64; 2]);
        let attributes = vec![("kernel_shape", sides()), ("strides", sides())];
        let edge =
            self.graph.push(Node { op, name: "pool".into(), inputs: vec![x.edge], attributes, macs: 0 });
        Ok(flow(edge, &[c, h / size, w / size]))
    }

    fn one_hot(&mut self, index: &Value, rows: usize) -> Result<Value> {
        match self.fold("one_hot", &[index], |e, v| e.one_hot(v[0], rows))? {
            Some(known) => Ok(known),
            None => Err(Error::Request("`one_hot`: got an index that depends on the image".into())),
        }
    }

    fn feature(&mut self, x: &Value, factor: f64) -> Result<Value> {
        if let Some(known) = self.fold("feature", &[x], |e, v| e.feature(v[0], factor))? {
            return Ok(known);
        }
        let (x, factor, last) = (self.lift(x)?, self.number(factor), self.sizes("axes", &[1]));
        let column = self.graph.node("Unsqueeze", "feature.column", &[x.edge, last]);
        Ok(flow(self.graph.node("Mul", "feature", &[column, factor]), &[1]))
    }

    fn narrow(&mut self, x: &Value, first: usize, count: usize) -> Result<Value> {
        if let Some(known) = self.fold("narrow", &[x], |e, v| e.narrow(v[0], first, count))? {
            return Ok(known);
        }
        let x = self.lift(x)?;
        let Some((_, rest)) = x.shape.split_first() else {
            return Err(wrong_shape("narrow", &x.shape, "[c] or [c, h, w]"));
        };
        let shape = [&[count], rest].concat();
        let (from, to) = (self.sizes("from", &[first as i64]), self.sizes("to", &[(first + count) as i64]));
        let axis = self.sizes("axes", &[1]);
        Ok(flow(self.graph.node("Slice", "narrow", &[x.edge, from, to, axis]), &shape))
    }

    fn scale_channels(&mut self, x: &Value, factor: &Value) -> Result<Value> {
        let name = "scale_channels";
        if let Some(known) = self.fold(name, &[x, factor], |e, v| e.scale_channels(v[0], v[1]))? {
            return Ok(known);
        }
        let x = self.lift(x)?;
        let factor = self.at_every_pixel(name, factor, &x)?;
        Ok(flow(self.graph.node("Mul", name, &[x.edge, factor]), &x.shape))
    }

    fn add(&mut self, a: &Value, b: &Value) -> Result<Value> {
        if let Some(known) = self.fold("add", &[a, b], |e, v| e.add(v[0], v[1]))? {
            return Ok(known);
        }
        let (a, b) = (self.lift(a)?, self.lift(b)?);
        if a.shape != b.shape {
            return Err(wrong_shape("add", &b.shape, &format!("{:?}", a.shape)));
        }
        Ok(flow(self.graph.node("Add", "add", &[a.edge, b.edge]), &a.shape))
    }

    fn add_bias(&mut self, x: &Value, bias: &Value) -> Result<Value> {
        if let Some(known) = self.fold("add_bias", &[x, bias], |e, v| e.add_bias(v[0], v[1]))? {
            return Ok(known);
        }
        let x = self.lift(x)?;
        let [c, _, _] = x.shape[..] else { return Err(wrong_shape("add_bias", &x.shape, "[c, h, w]")) };
        if let Value::Const(known) = bias
            && let Some(edge) = self.merged(x.edge, &known.array.clone().reshaped(&[c])?)?
        {
            return Ok(flow(edge, &x.shape));
        }
        match (bias, self.convolution_of(x.edge)) {
            (Value::Table(known), Some((mut conv, name, own))) => {
                let table = known.array.zip_rows(&own.reshaped(&[1, c])?, |a, b| a + b)?;
                let array = table.reshaped(&[known.array.rows(), c, 1, 1])?;
                conv.inputs.truncate(2);
                let biased = format!("{}.biased", conv.name);
                let image = self.graph.push(conv);
                let bias = self.gather(&Known { array, name })?;
                Ok(flow(self.graph.node("Add", &biased, &[image, bias.edge]), &x.shape))
            }
            _ => {
                let bias = self.at_every_pixel("bias", bias, &x)?;
                Ok(flow(self.graph.node("Add", "biased", &[x.edge, bias]), &x.shape))
            }
        }
    }

    fn scale(&mut self, x: &Value, factor: f64) -> Result<Value> {
        if let Some(known) = self.fold("scale", &[x], |e, v| e.scale(v[0], factor))? {
            return Ok(known);
        }
        let (x, factor) = (self.lift(x)?, self.number(factor));
        Ok(flow(self.graph.node("Mul", "scale", &[x.edge, factor]), &x.shape))
    }

    fn concat(&mut self, a: &Value, b: &Value) -> Result<Value> {
        if let Some(known) = self.fold("concat", &[a, b], |e, v| e.concat(v[0], v[1]))? {
            return Ok(known);
        }
        let (a, b) = (self.batched("concat", a)?, self.batched("concat", b)?);
        let shape = match (&a.shape[..], &b.shape[..]) {
            ([ca, ha, wa], [cb, hb, wb]) if (ha, wa) == (hb, wb) => [ca + cb, *ha, *wa],
            _ => return Err(wrong_shape("concat", &b.shape, &format!("the size of {:?}", a.shape))),
        };
        let (inputs, attributes) = (vec![a.edge, b.edge], vec![("axis", Attribute::Int(1))]);
        let edge = self.graph.push(Node { op: "Concat", name: "concat".into(), inputs, attributes, macs: 0 });
        Ok(flow(edge, &shape))
    }

    fn upsample_nearest2x(&mut self, x: &Value) -> Result<Value> {
        if let Some(known) = self.fold("upsample", &[x], |e, v| e.upsample_nearest2x(v[0]))? {
            return Ok(known);
        }
        let x = self.lift(x)?;
        let [c, h, w] = x.shape[..] else { return Err(wrong_shape("upsample", &x.shape, "[c, h, w]")) };
        let scales = Array::new(&[4], vec![1.0, 1.0, 2.0, 2.0])?;
        let scales = self.graph.shared("upsample.scales", Data::Float(scales));
        let edge = self.graph.push(Node {
            op: "Resize",
            name: "upsample".into(),
            inputs: vec![x.edge, Edge::Absent, scales],
            attributes: vec![
                ("coordinate_transformation_mode", Attribute::Text("asymmetric")),
                ("mode", Attribute::Text("nearest")),
                ("nearest_mode", Attribute::Text("floor")),
            ],
            macs: 0,
        });
        Ok(flow(edge, &[c, 2 * h, 2 * w]))
    }

    fn attention(&mut self, q: &Value, k: &Value, v: &Value, heads: usize) -> Result<Value> {
        let name = "attention";
        if let Some(known) = self.fold(name, &[q, k, v], |e, x| e.attention(x[0], x[1], x[2], heads))? {
            return Ok(known);
        }
        let q = self.batched(name, q)?;
        let (k, v) = (self.batched(name, k)?, self.batched(name, v)?);
        let [c, h, w] = match q.shape[..] {
            [c, h, w] if k.shape == q.shape && v.shape == q.shape && c % heads == 0 => [c, h, w],
            _ => return Err(wrong_shape(name, &k.shape, &format!("{:?} for {heads} heads", q.shape))),
        };
        let (d, pixels) = (c / heads, h * w);
        let split = [0, heads as i64, d as i64, pixels as i64];
        let q = self.reshape("attention.q", q.edge, &split);
        let k = self.reshape("attention.k", k.edge, &split);
        let v = self.reshape("attention.v", v.edge, &split);
        let factor = self.number(1.0 / (d as f64).sqrt());
        let macs = (pixels * pixels * c) as u64;
        let q = self.graph.node("Mul", "attention.q_scaled", &[q, factor]);
        let q = self.transpose_last_two("attention.q_rows", q);
        let product = |name: &str, inputs: Vec<Edge>| Node {
            op: "MatMul",
            name: name.into(),
            inputs,
            attributes: vec![],
            macs,
        };
        let scores = self.graph.push(product("attention.scores", vec![q, k]));
        let attributes = vec![("axis", Attribute::Int(-1))];
        let name = "attention.probabilities".to_owned();
        let probabilities =
            self.graph.push(Node { op: "Softmax", name, inputs: vec![scores], attributes, macs: 0 });
        let columns = self.transpose_last_two("attention.columns", probabilities);
        let values = self.graph.push(product("attention.values", vec![v, columns]));
        let edge = self.reshape("attention", values, &[0, c as i64, h as i64, w as i64]);
        Ok(flow(edge, &[c, h, w]))
    }
}

impl Exporter<'_> {
    /// A value per channel in the shape `[n, c, 1, 1]`, for an operation with `x`.
    fn at_every_pixel(&mut self, name: &str, value: &Value, x: &Flow) -> Result<Edge> {
        let c = x.shape.first().copied().unwrap_or(0);
        let known = |known: &Known| -> Result<Known> {
            let (rows, len) = (known.array.rows(), known.array.data.len());
            if len != rows * c {
                return Err(wrong_shape(name, &known.array.shape[1..], &format!("[{c}]")));
            }
            Ok(Known { array: known.array.clone().reshaped(&[rows, c, 1, 1])?, name: known.name.clone() })
        };
        match value {
            Value::Const(v) => Ok(self.lift(&Value::Const(known(v)?))?.edge),
            Value::Table(v) => Ok(self.gather(&known(v)?)?.edge),
            Value::Flow(v) if v.shape == [c] => {
                let axes = self.sizes("axes", &[2, 3]);
                Ok(self.graph.node("Unsqueeze", name, &[v.edge, axes]))
            }
            Value::Flow(v) => Err(wrong_shape(name, &v.shape, &format!("[{c}]"))),
        }
    }

    fn silu_of(&mut self, x: &Flow, name: &str) -> Value {
        let sigmoid = self.graph.node("Sigmoid", &format!("{name}.sigmoid"), &[x.edge]);
        flow(self.graph.node("Mul", &format!("{name}.silu"), &[x.edge, sigmoid]), &x.shape)
    }
}
