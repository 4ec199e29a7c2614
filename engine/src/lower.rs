//! How each operator of `docs/onnx.md` becomes a step, or a stored value, or the same value in another shape.

use std::sync::Arc;

use crate::Result;
use crate::build::{Builder, Flow, Operand, Value};
use crate::kernels::conv::{Conv, ConvTranspose, Geometry};
use crate::kernels::norm::GroupNorm;
use crate::kernels::pointwise::{Binary, Repeat, Unary};
use crate::kernels::shape::Pool;
use crate::message::{Node, data_type};
use crate::nodes::MAX_SIZE;
use crate::operators::Operator;
use crate::tensor::{Stored, count, dequantize};

impl Builder {
    /// The node's first output.
    pub(crate) fn lower(&mut self, node: &Node) -> Result<Value> {
        if !node.domain.is_empty() && node.domain != "ai.onnx" {
            return Err(node.wrong(format!("got an operator of `{}`, expected ONNX's own", node.domain)));
        }
        let flow = match node.op_type.as_str() {
            "Constant" | "DequantizeLinear" => return self.known(node),
            "Cast" => return self.cast(node),
            "Identity" => match self.input(node, 0)? {
                Value::Flow(flow) => self.same(node, flow)?,
                stored => return Ok(stored),
            },
            "Add" => self.binary(node, Binary::Add)?,
            "Sub" => self.binary(node, Binary::Sub)?,
            "Div" => self.binary(node, Binary::Div)?,
            "Mul" => match self.fuse_silu(node) {
                Some(flow) => flow,
                None => self.binary(node, Binary::Mul)?,
            },
            "Sigmoid" => self.unary(node, Unary::Sigmoid)?,
            "Relu" => self.unary(node, Unary::Relu)?,
            "Tanh" => self.unary(node, Unary::Tanh)?,
            "Softplus" => self.unary(node, Unary::Softplus)?,
            "Erf" => self.unary(node, Unary::Erf)?,
            "Sin" => self.unary(node, Unary::Sin)?,
            "Cos" => self.unary(node, Unary::Cos)?,
            "Neg" => self.unary(node, Unary::Neg)?,
            "Floor" => self.unary(node, Unary::Floor)?,
            "Clip" => {
                let bound = |index: usize, default: f32| -> Result<f32> {
                    Ok(match self.optional(node, index)? {
                        None => default,
                        Some(_) => self.floats(node, index)?.first().copied().unwrap_or(default),
                    })
                };
                let clip = Unary::Clip(bound(1, f32::MIN)?, bound(2, f32::MAX)?);
                self.unary(node, clip)?
            }
            "Conv" => self.conv(node)?,
            "ConvTranspose" => self.conv_transpose(node)?,
            "Gemm" => self.gemm(node)?,
            "MatMul" => self.matmul(node)?,
            "InstanceNormalization" => self.instance_norm(node)?,
            "BatchNormalization" => self.batch_norm(node)?,
            "Softmax" => {
                let x = self.flow(node, 0)?;
                let axis = node.axis(node.int("axis", -1), x.shape.len())?;
                if axis + 1 != x.shape.len() {
                    return Err(node.wrong(format!("got axis {axis}, expected the last one")));
                }
                self.step(node, Operator::Softmax(x.shape[axis]), operands(&[&x]), x.shape)
            }
            "MaxPool" | "AveragePool" => self.pool(node)?,
            "Resize" => self.resize(node)?,
            "Reshape" | "Unsqueeze" => self.reshape(node)?,
            "Transpose" => {
                let x = self.flow(node, 0)?;
                let order = node.sizes("perm")?.unwrap_or_else(|| (0..x.shape.len()).rev().collect());
                let mut sorted = order.clone();
                sorted.sort_unstable();
                if !sorted.into_iter().eq(0..x.shape.len()) {
                    return Err(node.wrong(format!("got `perm` {order:?} for shape {:?}", x.shape)));
                }
                let shape = order.iter().map(|&i| x.shape[i]).collect();
                self.step(node, Operator::Transpose(x.shape.clone(), order), operands(&[&x]), shape)
            }
            "Concat" => self.concat(node)?,
            "Slice" => self.slice(node)?,
            "Gather" => self.gather(node)?,
            _ => {
                return Err(node.wrong(
                    "this operator is not one that `dmd-export` writes\n\n\
                     hint: export the model with `dmd-export`, or run it with onnxruntime",
                ));
            }
        };
        Ok(Value::Flow(flow))
    }

    /// An operator on stored values alone.
    fn known(&mut self, node: &Node) -> Result<Value> {
        if node.op_type == "Constant" {
            let value = node.attribute.iter().find(|a| a.name == "value").and_then(|a| a.t.clone());
            let value = value.ok_or_else(|| node.wrong("the attribute `value` is missing"))?;
            return Ok(Value::Stored(Arc::new(Stored::File(Box::new(value)))));
        }
        node.only("block_size", 0)?;
        let (x, scale, zero) = (self.stored(node, 0)?, self.stored(node, 1)?, self.optional_stored(node, 2)?);
        let axis = node.axis(node.int("axis", 1), x.shape().len().max(2))?;
        let made = dequantize(&x, &scale, zero.as_deref(), axis).map_err(|e| node.wrong(e))?;
        Ok(Value::Stored(Arc::new(made)))
    }

    fn cast(&mut self, node: &Node) -> Result<Value> {
        use data_type::{FLOAT, INT32, INT64, UINT8};
        let to = node.int("to", 0);
        let to = i32::try_from(to).unwrap_or(0);
        match self.input(node, 0)? {
            Value::Stored(stored) if to == FLOAT => {
                let values = stored.floats().map_err(|e| node.wrong(e))?.into_owned();
                Ok(Value::Stored(Arc::new(Stored::Floats(stored.shape(), values))))
            }
            Value::Flow(flow) if to == FLOAT && !self.integers[flow.value] => {
                Ok(Value::Flow(self.same(node, flow)?))
            }
            Value::Flow(_) if [FLOAT, INT64, INT32, UINT8].contains(&to) => {
                let whole = self.unary(node, Unary::Truncate)?;
                self.integers[whole.value] = to != FLOAT;
                Ok(Value::Flow(whole))
            }
            _ => Err(node
                .wrong(format!("got a conversion to {}, which is not supported here", data_type::name(to)))),
        }
    }

    fn unary(&mut self, node: &Node, f: Unary) -> Result<Flow> {
        let x = self.flow(node, 0)?;
        Ok(self.step(node, Operator::Unary(f), operands(&[&x]), x.shape))
    }

    fn binary(&mut self, node: &Node, f: Binary) -> Result<Flow> {
        let divides = matches!(f, Binary::Div);
        let operand = |value: Value| -> Result<(Operand, Vec<usize>)> {
            match value {
                Value::Flow(flow) if divides && self.integers[flow.value] => {
                    Err(node.wrong("got integers, expected floats"))
                }
                Value::Flow(flow) => Ok((Operand::Value(flow.value), flow.shape)),
                Value::Stored(stored) if divides && stored.is_of_integers() => {
                    Err(node.wrong("got integers, expected floats"))
                }
                Value::Stored(stored) => {
                    let values = stored.floats().map_err(|e| node.wrong(e))?;
                    Ok((Operand::Known(Arc::from(&values[..])), stored.shape()))
                }
            }
        };
        let (a, mut a_shape) = operand(self.input(node, 0)?)?;
        let (b, mut b_shape) = operand(self.input(node, 1)?)?;
        let rank = a_shape.len().max(b_shape.len());
        for shape in [&mut a_shape, &mut b_shape] {
            shape.splice(0..0, std::iter::repeat_n(1, rank - shape.len()));
        }
        let fits = |(a, b): (&usize, &usize)| match (*a, *b) {
            (a, b) if a == b || b == 1 => Some(a),
            (1, b) => Some(b),
            _ => None,
        };
        let shape: Option<Vec<usize>> = a_shape.iter().zip(&b_shape).map(fits).collect();
        let shape = shape.ok_or_else(|| node.wrong(format!("got shapes {a_shape:?} and {b_shape:?}")))?;
        if a_shape == shape
            && a.value().is_some()
            && let Some(repeat) = repeat_of(&b_shape, &shape)
        {
            return Ok(self.step(node, Operator::Binary(f, repeat), vec![a, b], shape));
        }
        if b_shape == shape
            && b.value().is_some()
            && let Some(repeat) = repeat_of(&a_shape, &shape)
        {
            return Ok(self.step(node, Operator::Binary(f.swapped(), repeat), vec![b, a], shape));
        }
        let mut widen = |operand: Operand, from: Vec<usize>| {
            let wide = Operator::Broadcast(from, shape.clone());
            Operand::Value(self.step(node, wide, vec![operand], shape.clone()).value)
        };
        let (a, b) = (widen(a, a_shape), widen(b, b_shape));
        Ok(self.step(node, Operator::Binary(f, Repeat { neighbours: 1 }), vec![a, b], shape))
    }

    fn conv(&mut self, node: &Node) -> Result<Flow> {
        let x = self.flow(node, 0)?;
        let (weight, values) = (self.stored(node, 1)?, self.floats(node, 1)?);
        let (&[n, c, h, w], &[out, input, kh, kw]) = (&x.shape[..], &weight.shape()[..]) else {
            return Err(node.wrong(format!("got x of shape {:?}, expected an image", x.shape)));
        };
        let kernel = [kh, kw];
        let (stride, pads) = self.window(node, kernel)?;
        let places = places([h, w], kernel, stride, pads);
        let (Some(places), true) = (places, input == c && kh * kw * out > 0) else {
            let shape = weight.shape();
            return Err(node.wrong(format!("got x of shape {:?} for weights of shape {shape:?}", x.shape)));
        };
        let margin = [pads[0], pads[1]];
        let geometry = Geometry { channels: c, image: [h, w], places, kernel, stride, margin };
        let bias = self.bias(node, out)?;
        let conv = Conv::new(geometry, &values, bias);
        let sizes = [c * h * w, out * geometry.positions()];
        let shape = vec![n, out, places[0], places[1]];
        Ok(self.step(node, Operator::Conv(Box::new(conv), sizes), operands(&[&x]), shape))
    }

    fn conv_transpose(&mut self, node: &Node) -> Result<Flow> {
        let x = self.flow(node, 0)?;
        let (weight, values) = (self.stored(node, 1)?, self.floats(node, 1)?);
        let (&[n, c, h, w], &[input, out, kh, kw]) = (&x.shape[..], &weight.shape()[..]) else {
            return Err(node.wrong(format!("got x of shape {:?}, expected an image", x.shape)));
        };
        let padded = node.sizes("output_padding")?.is_some_and(|pads| pads.iter().any(|&p| p != 0));
        if padded || node.sizes("output_shape")?.is_some() {
            return Err(node.wrong("got `output_padding` or `output_shape`, which are not supported here"));
        }
        let kernel = [kh, kw];
        let (stride, pads) = self.window(node, kernel)?;
        let side = |i: usize, n: usize| {
            let covered = (n.max(1) - 1).checked_mul(stride[i])?.checked_add(kernel[i])?;
            covered.checked_sub(pads[i] + pads[i + 2]).filter(|n| *n > 0)
        };
        let (Some(oh), Some(ow), true) = (side(0, h), side(1, w), input == c && kh * kw * out > 0) else {
            let shape = weight.shape();
            return Err(node.wrong(format!("got x of shape {:?} for weights of shape {shape:?}", x.shape)));
        };
        let (image, places, margin) = ([oh, ow], [h, w], [pads[0], pads[1]]);
        let geometry = Geometry { channels: out, image, places, kernel, stride, margin };
        let bias = self.bias(node, out)?;
        let conv = ConvTranspose::new(geometry, &values, bias);
        let operator = Operator::ConvTranspose(Box::new(conv), [c * h * w, out * oh * ow]);
        Ok(self.step(node, operator, operands(&[&x]), vec![n, out, oh, ow]))
    }

    /// The bias of a convolution or a linear layer: the third input, or zeros.
    fn bias(&self, node: &Node, len: usize) -> Result<Vec<f32>> {
        match self.optional(node, 2)? {
            None => Ok(vec![0.0; len]),
            Some(_) => match &self.stored(node, 2)?.shape()[..] {
                [n] | [1, n] if *n == len => self.floats(node, 2),
                shape => Err(node.wrong(format!("got a bias of shape {shape:?}, expected [{len}]"))),
            },
        }
    }

    /// Steps and margins (top, left, bottom, right) of a window of the size `kernel`.
    fn window(&self, node: &Node, kernel: [usize; 2]) -> Result<([usize; 2], [usize; 4])> {
        node.only_text("auto_pad", "NOTSET", "NOTSET")?;
        node.only("group", 1)?;
        if node.pair("dilations", [1, 1])? != [1, 1] || node.pair("kernel_shape", kernel)? != kernel {
            return Err(node.wrong("got `dilations` or a `kernel_shape` that is not that of the weights"));
        }
        let pads = node.sizes("pads")?.unwrap_or_else(|| vec![0; 4]);
        let pads = <[usize; 4]>::try_from(pads)
            .map_err(|pads| node.wrong(format!("got `pads` {pads:?}, expected four sizes")))?;
        Ok((node.pair("strides", [1, 1])?, pads))
    }

    fn gemm(&mut self, node: &Node) -> Result<Flow> {
        node.only("transA", 0)?;
        if node.float("alpha", 1.0) != 1.0 || node.float("beta", 1.0) != 1.0 {
            return Err(node.wrong("got `alpha` or `beta`, expected 1"));
        }
        let turned = node.int("transB", 0) == 0;
        self.linear(node, turned)
    }

    /// A product with stored weights: `[out, in]`, or, if `turned`, `[in, out]`.
    fn linear(&mut self, node: &Node, turned: bool) -> Result<Flow> {
        let x = self.flow(node, 0)?;
        let stored = self.stored(node, 1)?;
        let (shape, mut weight) = (stored.shape(), self.floats(node, 1)?);
        let (&[rows, columns], Some(&depth)) = (&shape[..], x.shape.last()) else {
            return Err(node.wrong(format!("got weights of shape {shape:?}, expected a matrix")));
        };
        let [out, input] = if turned { [columns, rows] } else { [rows, columns] };
        if input != depth || out * input == 0 {
            return Err(node.wrong(format!("got x of shape {:?} for weights of shape {shape:?}", x.shape)));
        }
        if turned {
            weight = (0..weight.len()).map(|i| weight[i % input * out + i / input]).collect();
        }
        let bias = self.bias(node, out)?;
        let mut shape = x.shape.clone();
        *shape.last_mut().unwrap_or(&mut 0) = out;
        Ok(self.step(node, Operator::Linear { weight, bias }, operands(&[&x]), shape))
    }

    fn matmul(&mut self, node: &Node) -> Result<Flow> {
        if matches!(self.input(node, 1)?, Value::Stored(_)) {
            return self.linear(node, true);
        }
        let (a, b) = (self.flow(node, 0)?, self.flow(node, 1)?);
        let (Some((&[rows, depth], a_batch)), Some((&[b_rows, columns], b_batch))) = (
            a.shape.split_last_chunk::<2>().map(|(r, l)| (l, r)),
            b.shape.split_last_chunk::<2>().map(|(r, l)| (l, r)),
        ) else {
            return Err(node.wrong("got a vector, expected matrices"));
        };
        if depth != b_rows || a_batch != b_batch || rows * depth * columns == 0 {
            return Err(node.wrong(format!("got shapes {:?} and {:?}", a.shape, b.shape)));
        }
        let shape = [a_batch, &[rows, columns]].concat();
        Ok(self.step(node, Operator::MatMul { sizes: [rows, depth, columns] }, operands(&[&a, &b]), shape))
    }

    fn instance_norm(&mut self, node: &Node) -> Result<Flow> {
        let x = self.flow(node, 0)?;
        let (scale, shift) = (self.floats(node, 1)?, self.floats(node, 2)?);
        let pixels = self.per_channel(node, &x, &[&scale, &shift])?;
        let epsilon = node.float("epsilon", 1e-5);
        let norm = GroupNorm { groups: scale.len(), pixels, epsilon, scale, shift, silu: false };
        Ok(self.step(node, Operator::GroupNorm(Box::new(norm)), operands(&[&x]), x.shape))
    }

    fn batch_norm(&mut self, node: &Node) -> Result<Flow> {
        node.only("training_mode", 0)?;
        let x = self.flow(node, 0)?;
        let [mut scale, mut shift] = [self.floats(node, 1)?, self.floats(node, 2)?];
        let [mean, variance] = [self.floats(node, 3)?, self.floats(node, 4)?];
        let pixels = self.per_channel(node, &x, &[&scale, &shift, &mean, &variance])?;
        let epsilon = node.float("epsilon", 1e-5);
        for i in 0..scale.len() {
            scale[i] /= (variance[i] + epsilon).sqrt();
            shift[i] -= mean[i] * scale[i];
        }
        if self.fuse_affine(node, &x, &scale, &shift) {
            return self.same(node, x);
        }
        let operator = Operator::Affine { scale, shift, pixels, silu: false };
        Ok(self.step(node, operator, operands(&[&x]), x.shape))
    }

    /// Values per channel of `x`, checked against parameters per channel.
    fn per_channel(&self, node: &Node, x: &Flow, parameters: &[&Vec<f32>]) -> Result<usize> {
        match &x.shape[..] {
            [_, c, pixels @ ..] if *c > 0 && parameters.iter().all(|p| p.len() == *c) => {
                Ok(pixels.iter().product())
            }
            shape => Err(node.wrong(format!("got x of shape {shape:?}, expected a channel per parameter"))),
        }
    }

    fn pool(&mut self, node: &Node) -> Result<Flow> {
        let x = self.flow(node, 0)?;
        let &[n, c, h, w] = &x.shape[..] else {
            return Err(node.wrong(format!("got x of shape {:?}, expected an image", x.shape)));
        };
        let kernel = node.pair("kernel_shape", [0, 0])?;
        node.only("ceil_mode", 0)?;
        let (stride, pads) = self.window(node, kernel)?;
        let places = places([h, w], kernel, stride, pads);
        let (Some(places), [0, 0, 0, 0]) = (places, pads) else {
            return Err(
                node.wrong(format!("got `pads` {pads:?} for x of shape {:?}, expected none", x.shape))
            );
        };
        let max = node.op_type == "MaxPool";
        let pool = Pool { image: [h, w], places, kernel, stride, max };
        Ok(self.step(node, Operator::Pool(pool), operands(&[&x]), vec![n, c, places[0], places[1]]))
    }

    fn resize(&mut self, node: &Node) -> Result<Flow> {
        let x = self.flow(node, 0)?;
        node.only_text("mode", "nearest", "nearest")?;
        node.only_text("coordinate_transformation_mode", "half_pixel", "asymmetric")?;
        node.only_text("nearest_mode", "round_prefer_floor", "floor")?;
        if node.sizes("axes")?.is_some_and(|axes| axes != [0, 1, 2, 3]) {
            return Err(node.wrong("got `axes`, expected all in their order"));
        }
        let scales = self.floats(node, 2)?;
        match (&x.shape[..], &scales[..]) {
            (&[n, c, h, w], &[1.0, 1.0, down, across])
                if [down, across].iter().all(|f| f.fract() == 0.0 && (1.0..=MAX_SIZE as f32).contains(f)) =>
            {
                let factors = [down as usize, across as usize];
                let shape = vec![n, c, h.saturating_mul(factors[0]), w.saturating_mul(factors[1])];
                Ok(self.step(node, Operator::Enlarge(w, factors), operands(&[&x]), shape))
            }
            _ => Err(node.wrong(format!("got scales {scales:?}, expected whole factors of an image"))),
        }
    }

    fn reshape(&mut self, node: &Node) -> Result<Flow> {
        let (x, numbers) = (self.flow(node, 0)?, self.integers(node, 1)?);
        if node.op_type == "Unsqueeze" {
            let rank = x.shape.len() + numbers.len();
            let axes = numbers.iter().map(|&axis| node.axis(axis, rank)).collect::<Result<Vec<_>>>()?;
            let mut old = x.shape.iter().copied();
            let shape =
                (0..rank).map(|i| if axes.contains(&i) { 1 } else { old.next().unwrap_or(1) }).collect();
            return self.reshaped(node, x, shape);
        }
        node.only("allowzero", 0)?;
        let wrong = || node.wrong(format!("got {numbers:?} for a value of shape {:?}", x.shape));
        let mut shape = Vec::with_capacity(numbers.len());
        for (i, &number) in numbers.iter().enumerate() {
            shape.push(match number {
                0 => *x.shape.get(i).ok_or_else(wrong)?,
                -1 => 1,
                n => usize::try_from(n).map_err(|_| wrong())?,
            });
        }
        if let Some(open) = numbers.iter().position(|&n| n == -1) {
            let known = count(&shape).ok_or_else(wrong)?;
            shape[open] = x.shape.iter().product::<usize>().checked_div(known).ok_or_else(wrong)?;
        }
        self.reshaped(node, x.clone(), shape)
    }

    fn concat(&mut self, node: &Node) -> Result<Flow> {
        let parts = (0..node.input.len()).map(|i| self.flow(node, i)).collect::<Result<Vec<_>>>()?;
        let Some(first) = parts.first() else { return Err(node.wrong("it has no input")) };
        let axis = node.axis(node.int("axis", 0), first.shape.len())?;
        let mut shape = first.shape.clone();
        shape[axis] = 0;
        let mut widths = Vec::with_capacity(parts.len());
        for part in &parts {
            let same = part.shape.len() == shape.len()
                && part.shape.iter().zip(&first.shape).enumerate().all(|(i, (a, b))| i == axis || a == b);
            if !same {
                return Err(node.wrong(format!("got shapes {:?} and {:?}", first.shape, part.shape)));
            }
            shape[axis] = part.shape[axis].saturating_add(shape[axis]);
            widths.push(part.shape[axis..].iter().product());
        }
        Ok(self.step(node, Operator::Concat(widths), operands(&parts.iter().collect::<Vec<_>>()), shape))
    }

    fn slice(&mut self, node: &Node) -> Result<Flow> {
        let x = self.flow(node, 0)?;
        let (from, to, axes) = (self.integers(node, 1)?, self.integers(node, 2)?, self.integers(node, 3)?);
        let steps =
            self.optional_stored(node, 4)?.map(|s| s.integers()).transpose().map_err(|e| node.wrong(e))?;
        let (&[from], &[to], &[axis], true) =
            (&from[..], &to[..], &axes[..], steps.is_none_or(|steps| steps == [1]))
        else {
            return Err(node.wrong("got several axes or steps, expected a range of one axis"));
        };
        let axis = node.axis(axis, x.shape.len())?;
        let size = x.shape[axis];
        let place = |at: i64| if at < 0 { at + size as i64 } else { at }.clamp(0, size as i64) as usize;
        let (from, to) = (place(from), place(to));
        if from >= to {
            return Err(node.wrong(format!("got {from} to {to} of {size}, expected at least one")));
        }
        let inner: usize = x.shape[axis + 1..].iter().product();
        let mut shape = x.shape.clone();
        shape[axis] = to - from;
        let operator = Operator::Slice([size * inner, from * inner, (to - from) * inner]);
        Ok(self.step(node, operator, operands(&[&x]), shape))
    }

    fn gather(&mut self, node: &Node) -> Result<Flow> {
        node.only("axis", 0)?;
        let (table, indices) = (self.stored(node, 0)?, self.flow(node, 1)?);
        let rows = table.shape();
        let (Some((&entries, rest)), values) =
            (rows.split_first(), table.floats().map_err(|e| node.wrong(e))?)
        else {
            return Err(node.wrong("got a single number, expected a table"));
        };
        let width: usize = rest.iter().product();
        if entries * width == 0 {
            return Err(node.wrong(format!("got a table of shape {rows:?}, expected some rows")));
        }
        let shape = [&indices.shape[..], rest].concat();
        let inputs = vec![Operand::Known(Arc::from(&values[..])), Operand::Value(indices.value)];
        Ok(self.step(node, Operator::Gather(width), inputs, shape))
    }
}

fn operands(flows: &[&Flow]) -> Vec<Operand> {
    flows.iter().map(|flow| Operand::Value(flow.value)).collect()
}

/// Positions of a window in an image, if there are any.
fn places(image: [usize; 2], kernel: [usize; 2], stride: [usize; 2], pads: [usize; 4]) -> Option<[usize; 2]> {
    let side = |i: usize| {
        let room = (image[i] + pads[i] + pads[i + 2]).checked_sub(kernel[i])?;
        (kernel[i] > 0).then_some(room / stride[i] + 1)
    };
    Some([side(0)?, side(1)?])
}

/// How an operand of shape `small` is repeated along `large`, if it is constant along the last axes, whole along those before
/// and constant along the first.
fn repeat_of(small: &[usize], large: &[usize]) -> Option<Repeat> {
    let mut axes = small.iter().zip(large).rev().peekable();
    let mut neighbours = 1;
    while let Some((_, l)) = axes.next_if(|(s, _)| **s == 1) {
        neighbours *= l;
    }
    while axes.next_if(|(s, l)| s == l).is_some() {}
    axes.all(|(s, _)| *s == 1).then_some(Repeat { neighbours })
}
