//! The forms of convolutions: what merges into one, and the cheaper form of one whose image was enlarged.

use dmd_core::net::Conv2d;

use crate::graph::{Attribute, Data, Edge, Node};
use crate::partial::{Exporter, Flow, Value, flow, wrong_shape};
use crate::{Array, Result};

impl Exporter<'_> {
    /// A convolution whose weight is stored as `[out, in, kernel, kernel]`, read from `weight_shape`.
    pub(crate) fn convolution(
        &mut self,
        x: &Flow,
        name: &str,
        spec: Conv2d,
        weight_shape: &[usize],
    ) -> Result<Value> {
        let Conv2d { in_channels, out_channels, kernel, stride, padding } = spec;
        let (h, w) = match x.shape[..] {
            [c, h, w] if c == in_channels => (h, w),
            _ => return Err(wrong_shape(name, &x.shape, &format!("[{in_channels}, h, w]"))),
        };
        if let Some(small) = self.enlarged(x.edge)
            && (kernel, stride, padding) == (3, 1, [1; 4])
        {
            return self.enlarging_convolution(small, name, spec, [h, w]);
        }
        let [top, left, bottom, right] = padding;
        let size = |n: usize, before: usize, after: usize| {
            let room = (n + before + after).checked_sub(kernel);
            room.map(|room| room / stride + 1).ok_or_else(|| wrong_shape(name, &x.shape, "a larger image"))
        };
        let (h, w) = (size(h, top, bottom)?, size(w, left, right)?);
        let stored = [out_channels, in_channels, kernel, kernel];
        let weight = self.parameter(&format!("{name}.weight"), weight_shape, &stored)?;
        let bias = self.parameter(&format!("{name}.bias"), &[out_channels], &[out_channels])?;
        let edge = self.graph.push(Node {
            op: "Conv",
            name: name.into(),
            inputs: vec![x.edge, weight, bias],
            attributes: vec![
                ("kernel_shape", Attribute::Ints(vec![kernel as i64; 2])),
                ("pads", Attribute::Ints(padding.map(|p| p as i64).to_vec())),
                ("strides", Attribute::Ints(vec![stride as i64; 2])),
            ],
            macs: (stored.iter().product::<usize>() * h * w) as u64,
        });
        Ok(flow(edge, &[out_channels, h, w]))
    }

    /// What was enlarged to this value, if that happened and the file is to have [`Exporter::enlarging`] convolutions.
    fn enlarged(&self, edge: Edge) -> Option<Edge> {
        let node = self.graph.producer(edge).filter(|node| self.enlarging && node.op == "Resize")?;
        node.inputs.first().copied()
    }

    /// The 3x3 convolution of `small` enlarged twice, to `[h, w]`, with a quarter of its multiplications.
    ///
    /// To repeat every pixel is to put zeros between pixels and to convolve with a square of 2x2 ones, and convolutions may
    /// change places: the zeros and the 3x3 weights are a ConvTranspose of stride 2, the square is four times an
    /// AveragePool. The four goes into the weights, where it is exact.
    fn enlarging_convolution(
        &mut self,
        small: Edge,
        name: &str,
        spec: Conv2d,
        [h, w]: [usize; 2],
    ) -> Result<Value> {
        let Conv2d { in_channels, out_channels, kernel, .. } = spec;
        let (weight_name, taps) = (format!("{name}.weight"), kernel * kernel);
        let shape = [out_channels, in_channels, kernel, kernel];
        let weight = self.evaluate.parameter(&weight_name, &shape)?;
        let mut turned = Vec::with_capacity(weight.data.len());
        for i in 0..in_channels {
            for o in 0..out_channels {
                turned.extend(
                    weight.data[(o * in_channels + i) * taps..][..taps].iter().rev().map(|w| 4.0 * w),
                );
            }
        }
        let turned = Array::new(&[in_channels, out_channels, kernel, kernel], turned)?;
        self.stored.insert(weight_name.clone());
        let weight = self.graph.constant(&weight_name, Data::Float(turned));
        let bias = self.parameter(&format!("{name}.bias"), &[out_channels], &[out_channels])?;
        let sides = |side: usize| Attribute::Ints(vec![side as i64; 2]);
        let spread = self.graph.push(Node {
            op: "ConvTranspose",
            name: format!("{name}.spread"),
            inputs: vec![small, weight, bias],
            attributes: vec![("kernel_shape", sides(kernel)), ("strides", sides(2))],
            macs: (shape.iter().product::<usize>() * h / 2 * w / 2) as u64,
        });
        let edge = self.graph.push(Node {
            op: "AveragePool",
            name: name.into(),
            inputs: vec![spread],
            attributes: vec![("kernel_shape", sides(2)), ("strides", sides(1))],
            macs: 0,
        });
        Ok(flow(edge, &[out_channels, h, w]))
    }

    /// A value with `bias` added per channel, where that can merge into a convolution: the value is one, or a sum with one, of
    /// which nothing else in a network reads the part without the bias.
    pub(crate) fn merged(&mut self, edge: Edge, bias: &Array) -> Result<Option<Edge>> {
        if let Some((mut conv, name, own)) = self.convolution_of(edge) {
            let sum = own.zip_rows(bias, |a, b| a + b)?;
            conv.inputs[2] = self.graph.constant(&name, Data::Float(sum));
            return Ok(Some(self.graph.push(conv)));
        }
        let Some(mut sum) = self.graph.producer(edge).filter(|node| node.op == "Add").cloned() else {
            return Ok(None);
        };
        for place in 0..sum.inputs.len() {
            if let Some(part) = self.merged(sum.inputs[place], bias)? {
                sum.inputs[place] = part;
                return Ok(Some(self.graph.push(sum)));
            }
        }
        Ok(None)
    }

    /// The convolution behind a value with its bias, if it is one.
    pub(crate) fn convolution_of(&self, edge: Edge) -> Option<(Node, String, Array)> {
        let node = self.graph.producer(edge).filter(|node| node.op == "Conv")?;
        match self.graph.value(*node.inputs.get(2)?)? {
            (name, Data::Float(bias)) => Some((node.clone(), name.clone(), bias.clone())),
            _ => None,
        }
    }
}
