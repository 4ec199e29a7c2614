//! 8-bit arithmetic: activations and weights of convolutions and linear layers between QuantizeLinear and DequantizeLinear
//! (QDQ), which onnxruntime turns into integer kernels. Ranges of activations come from the generator's own noise, run through the
//! f32 graph. The head, attention, normalisation and the arithmetic of the step stay f32.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use dmd_core::card::ModelCard;
use serde_json::Value;
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{GraphProto, NodeProto, TensorProto};

use crate::graph::{Attribute, message};
use crate::measure::Running;
use crate::precision::{floats, head, integers, stored};
use crate::{Result, measure};

/// Operators that onnxruntime has integer kernels for.
const QUANTISED: [&str; 2] = ["Conv", "Gemm"];
/// Images of the calibration, seed 0.
const IMAGES: u64 = 32;
/// Images whose errors are measured.
const MEASURED: usize = 8;
/// Bins of an activation's histogram.
const BINS: usize = 2048;
/// Share of an activation's values that [`Method::Percentile`] cuts off at each end.
const TAIL: f64 = 5e-5;
/// Levels of an unsigned 8-bit activation.
const LEVELS: f32 = 255.0;
/// Largest 7-bit weight. AVX2 adds two products of u8 and i8 in 16 bits, where 8-bit weights saturate.
const LARGEST_WEIGHT: f32 = 63.0;
/// Largest bias in its steps: half of what 32 bits hold, the rest is for the sums it is added to.
const LARGEST_BIAS: f32 = (1 << 30) as f32;

/// How the range of an activation is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Method {
    /// Smallest to largest value.
    MinMax,
    /// Without the outermost values.
    Percentile,
    /// Where the mean squared error of rounding and clipping is smallest.
    #[default]
    Mse,
}

impl Method {
    /// Their names.
    pub const NAMES: [&str; 3] = ["min-max", "percentile", "mse"];
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(Self::NAMES[*self as usize])
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let all = [Self::MinMax, Self::Percentile, Self::Mse];
        let found = all.into_iter().find(|method| method.to_string() == text);
        found.ok_or_else(|| format!("got `{text}`, expected `{}`", Self::NAMES.join("`, `")))
    }
}

/// How an activation becomes `round(x/scale) + zero` in 0 to 255.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Steps {
    scale: f32,
    zero: u8,
}

impl Steps {
    /// For values from `low` to `high`; 0 is exact, which padding needs.
    fn new(low: f32, high: f32) -> Self {
        let (low, high) = (low.min(0.0), high.max(0.0));
        let scale = if high > low { (high - low) / LEVELS } else { 1.0 };
        Self { scale, zero: (-low / scale).round() as u8 }
    }

    fn rounded(self, x: f32) -> f32 {
        let zero = f32::from(self.zero);
        (((x / self.scale).round_ties_even() + zero).clamp(0.0, LEVELS) - zero) * self.scale
    }
}

/// Quantises a verified f32 graph of a generator. Returns what it costs, for the card: the errors of `x_gen` of some images,
/// computed with the rounding of every activation and weight in f32.
///
/// # Errors
/// If the graph cannot be run.
pub fn quantise(graph: &mut GraphProto, card: &ModelCard, method: Method) -> Result<Value> {
    let exact = graph.clone();
    write_integers(graph, card, method)?;
    measure::difference(&simulated(graph), &exact, card, MEASURED)
}

fn write_integers(graph: &mut GraphProto, card: &ModelCard, method: Method) -> Result<()> {
    let head = head(graph);
    let quantised =
        |node: &NodeProto| QUANTISED.contains(&node.op_type.as_str()) && !head.contains(&node.input[1]);
    let layers: Vec<&NodeProto> = graph.node.iter().filter(|node| quantised(node)).collect();
    let watched: BTreeSet<&String> =
        layers.iter().flat_map(|node| [&node.input[0], &node.output[0]]).collect();
    let watched: Vec<String> = watched.into_iter().cloned().collect();
    let steps = calibrate(graph, card, &watched, method)?;
    let mut writer = Writer { steps, written: BTreeSet::new(), constants: Vec::new(), nodes: Vec::new() };
    let mut values: BTreeMap<String, TensorProto> =
        std::mem::take(&mut graph.initializer).into_iter().map(|t| (t.name.clone(), t)).collect();
    for mut node in std::mem::take(&mut graph.node) {
        if !quantised(&node) {
            writer.nodes.push(node);
            continue;
        }
        let (input, output) = (node.input[0].clone(), node.output[0].clone());
        node.input[0] = writer.input(&input);
        if let Some(weight) = values.remove(&node.input[1]) {
            let bias = node.input.get(2).and_then(|name| values.remove(name));
            writer.layer(&weight, bias.as_ref(), &input);
        }
        let exact = format!("{output}.exact");
        node.output[0].clone_from(&exact);
        node.name.clone_from(&exact);
        writer.nodes.push(node);
        writer.rounded(&exact, &output, &output);
    }
    graph.initializer = values.into_values().chain(writer.constants).collect();
    graph.node = writer.nodes;
    Ok(())
}

/// The quantised graph as far as it is written.
struct Writer {
    steps: BTreeMap<String, Steps>,
    /// Activations that exist in 8 bits.
    written: BTreeSet<String>,
    constants: Vec<TensorProto>,
    nodes: Vec<NodeProto>,
}

impl Writer {
    /// Rounds the value `from` to the steps of `activation`; the result is called `to`.
    fn rounded(&mut self, from: &str, activation: &str, to: &str) {
        let Some(Steps { scale, zero }) = self.steps.get(activation).copied() else { return };
        let names = ["u8", "step", "zero"].map(|what| format!("{activation}.{what}"));
        let [integers, step, middle] = names.clone();
        self.constants.push(stored(step.clone(), DataType::Float, vec![], scale.to_le_bytes().to_vec()));
        self.constants.push(stored(middle.clone(), DataType::Uint8, vec![], vec![zero]));
        let inputs = vec![from.to_owned(), step, middle];
        self.nodes.push(message("QuantizeLinear", &integers, inputs, &[]));
        self.nodes.push(message("DequantizeLinear", to, names.to_vec(), &[]));
        self.written.insert(activation.to_owned());
    }

    /// The name of an activation after it was rounded.
    fn input(&mut self, activation: &str) -> String {
        let name = format!("{activation}.rounded");
        if self.nodes.iter().any(|node| node.op_type == "DequantizeLinear" && node.output[0] == activation) {
            return activation.to_owned();
        }
        if !self.written.contains(activation) {
            self.rounded(activation, activation, &name);
        }
        name
    }

    /// Weights in 8 bits; the bias in 32, in steps of input and weight together. A channel of tiny weights has steps that are
    /// large enough for its bias.
    fn layer(&mut self, weight: &TensorProto, bias: Option<&TensorProto>, input: &str) {
        let step = self.steps.get(input).map_or(1.0, |steps| steps.scale);
        let least = bias.into_iter().flat_map(floats).map(|b| b.abs() / step / LARGEST_BIAS);
        let (constants, node) = integers(weight, 0, LARGEST_WEIGHT, &least.collect::<Vec<_>>());
        let steps: Vec<f32> = floats(&constants[1]).map(|scale| scale * step).collect();
        self.constants.extend(constants);
        self.nodes.push(node);
        let Some(bias) = bias else { return };
        let whole = floats(bias).zip(&steps).map(|(b, step)| (b / step).round() as i32);
        let bytes = whole.flat_map(i32::to_le_bytes).collect();
        let names = [format!("{}.int32", bias.name), format!("{}.scale", bias.name)];
        let count = vec![steps.len() as i64];
        let of_steps = steps.iter().flat_map(|step| step.to_le_bytes()).collect();
        self.constants.push(stored(names[0].clone(), DataType::Int32, count.clone(), bytes));
        self.constants.push(stored(names[1].clone(), DataType::Float, count, of_steps));
        let axis = [("axis", Attribute::Int(0))];
        self.nodes.push(message("DequantizeLinear", &bias.name, names.to_vec(), &axis));
    }
}

/// Runs the graph on noise and chooses the steps of the values `names`.
fn calibrate(
    graph: &GraphProto,
    card: &ModelCard,
    names: &[String],
    method: Method,
) -> Result<BTreeMap<String, Steps>> {
    let running = Running::new(graph, card, names)?;
    let run = |image: u64| running.outputs(image);
    let mut ranges = vec![[f32::INFINITY, f32::NEG_INFINITY]; names.len()];
    for image in 0..IMAGES {
        for (range, values) in ranges.iter_mut().zip(run(image)?) {
            let [low, high] = *range;
            *range = [values.iter().fold(low, |a, v| a.min(*v)), values.iter().fold(high, |a, v| a.max(*v))];
        }
    }
    if method != Method::MinMax {
        let mut histograms: Vec<Histogram> = ranges.iter().map(|range| Histogram::new(*range)).collect();
        for image in 0..IMAGES {
            for (histogram, values) in histograms.iter_mut().zip(run(image)?) {
                values.iter().for_each(|v| histogram.count(*v));
            }
        }
        for (range, histogram) in ranges.iter_mut().zip(&histograms) {
            *range = if method == Method::Mse { histogram.least_error() } else { histogram.without_tails() };
        }
    }
    Ok(names.iter().cloned().zip(ranges.iter().map(|[low, high]| Steps::new(*low, *high))).collect())
}

/// The quantised graph in f32: activations are rounded and clipped, weights and biases are the rounded ones. tract, which runs
/// it, rounds otherwise between QuantizeLinear and DequantizeLinear.
fn simulated(graph: &GraphProto) -> GraphProto {
    let mut simulated = graph.clone();
    let constants: BTreeMap<&String, &TensorProto> = graph.initializer.iter().map(|t| (&t.name, t)).collect();
    simulated.node.clear();
    for node in &graph.node {
        let constant = |place: usize| node.input.get(place).and_then(|name| constants.get(name)).copied();
        let name = &node.output[0];
        match (node.op_type.as_str(), constant(0), constant(1), constant(2)) {
            ("QuantizeLinear", _, Some(_), Some(zero)) => {
                let zero = f32::from(zero.raw_data[0]);
                let [low, high] = [("low", -zero), ("high", LEVELS - zero)].map(|(what, value)| {
                    let border = format!("{name}.{what}");
                    let bytes = value.to_le_bytes().to_vec();
                    simulated.initializer.push(stored(border.clone(), DataType::Float, vec![], bytes));
                    border
                });
                let [steps, whole] = ["steps", "whole"].map(|what| format!("{name}.{what}"));
                simulated.node.push(message("Div", &steps, node.input[..2].to_vec(), &[]));
                simulated.node.push(message("Round", &whole, vec![steps], &[]));
                simulated.node.push(message("Clip", name, vec![whole, low, high], &[]));
            }
            ("DequantizeLinear", None, ..) => {
                simulated.node.push(message("Mul", name, node.input[..2].to_vec(), &[]));
            }
            ("DequantizeLinear", Some(integers), Some(scales), _) => {
                let scales: Vec<f32> = floats(scales).collect();
                let row = integers.dims.iter().product::<i64>() as usize / scales.len();
                let bytes = (whole_numbers(integers).enumerate())
                    .flat_map(|(i, v)| (v as f32 * scales[i / row]).to_le_bytes())
                    .collect();
                let dims = integers.dims.clone();
                simulated.initializer.push(stored(name.clone(), DataType::Float, dims, bytes));
            }
            _ => simulated.node.push(node.clone()),
        }
    }
    let read: BTreeSet<&String> = simulated.node.iter().flat_map(|node| &node.input).collect();
    simulated.initializer.retain(|tensor| read.contains(&tensor.name));
    simulated
}

/// Values of an int8 or int32 tensor.
fn whole_numbers(tensor: &TensorProto) -> impl Iterator<Item = i32> + '_ {
    let wide = tensor.data_type == DataType::Int32 as i32;
    tensor.raw_data.chunks_exact(if wide { 4 } else { 1 }).map(move |bytes| match bytes {
        [a, b, c, d] => i32::from_le_bytes([*a, *b, *c, *d]),
        bytes => i32::from(bytes[0] as i8),
    })
}

/// How often values of an activation fall between equally wide borders.
struct Histogram {
    low: f32,
    width: f32,
    bins: Vec<u64>,
}

impl Histogram {
    fn new([low, high]: [f32; 2]) -> Self {
        Self { low, width: ((high - low) / BINS as f32).max(f32::MIN_POSITIVE), bins: vec![0; BINS] }
    }

    fn count(&mut self, value: f32) {
        let bin = ((value - self.low) / self.width) as usize;
        self.bins[bin.min(BINS - 1)] += 1;
    }

    fn border(&self, bin: usize) -> f32 {
        self.low + self.width * bin as f32
    }

    /// The range without [`TAIL`] of the values at each end.
    fn without_tails(&self) -> [f32; 2] {
        let tail = (self.bins.iter().sum::<u64>() as f64 * TAIL) as u64;
        let after = |bins: &mut dyn Iterator<Item = &u64>| {
            let mut seen = 0;
            bins.take_while(|n| {
                seen += **n;
                seen <= tail
            })
            .count()
        };
        let (below, above) = (after(&mut self.bins.iter()), after(&mut self.bins.iter().rev()));
        [self.border(below), self.border(BINS - above)]
    }

    /// The part of the whole range, cut at either end, whose steps are nearest to the values.
    fn least_error(&self) -> [f32; 2] {
        let whole = [self.border(0), self.border(BINS)];
        let shares = || (0..15).map(|i| 1.0 - 0.05 * i as f32);
        let candidates = shares().flat_map(|low| shares().map(move |high| [whole[0] * low, whole[1] * high]));
        let error = |[low, high]: [f32; 2]| {
            let steps = Steps::new(low, high);
            let square = |(bin, n): (usize, &u64)| {
                let value = self.border(bin) + 0.5 * self.width;
                *n as f64 * f64::from(value - steps.rounded(value)).powi(2)
            };
            self.bins.iter().enumerate().map(square).sum::<f64>()
        };
        candidates.min_by(|a, b| error(*a).total_cmp(&error(*b))).unwrap_or(whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bias_survives_beside_tiny_weights() {
        let tensor = |name: &str, dims: &[i64], values: &[f32]| {
            let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            stored(name.to_owned(), DataType::Float, dims.to_vec(), bytes)
        };
        let steps = [("x".to_owned(), Steps::new(-1.0, 1.0))].into();
        let mut writer = Writer { steps, written: BTreeSet::new(), constants: Vec::new(), nodes: Vec::new() };
        let biases = [0.5, -0.5, 0.0, 3.0];
        let weight = tensor("w", &[4, 2], &[1e-12, -1e-12, 1.0, -0.25, 1e-12, 0.0, 0.0, 0.0]);
        writer.layer(&weight, Some(&tensor("b", &[4], &biases)), "x");
        let constant = |name: &str| writer.constants.iter().find(|c| c.name == name).unwrap();
        let made =
            whole_numbers(constant("b.int32")).zip(floats(constant("b.scale"))).map(|(b, s)| b as f32 * s);
        for (made, bias) in made.zip(biases) {
            assert!((made - bias).abs() <= 1e-2 * bias.abs(), "{made}, expected {bias}");
        }
        let kept: Vec<i32> = whole_numbers(constant("w.int8")).collect();
        assert_eq!(kept[2..4], [LARGEST_WEIGHT as i32, -(LARGEST_WEIGHT / 4.0).round() as i32]);
    }

    #[test]
    fn zero_is_exact_and_borders_are_kept() {
        for (low, high) in [(-1.0, 3.0), (0.5, 2.0), (-2.0, -1.0), (0.0, 0.0)] {
            let steps = Steps::new(low, high);
            assert_eq!(steps.rounded(0.0), 0.0);
            for border in [f32::min(low, 0.0), f32::max(high, 0.0)] {
                assert!((steps.rounded(border) - border).abs() <= 0.5 * steps.scale, "{low} {high} {border}");
            }
        }
        assert_eq!(Steps::new(-1.0, 1.0).rounded(5.0), Steps::new(-1.0, 1.0).rounded(1.1));
    }

    #[test]
    fn an_outlier_does_not_stretch_the_range() {
        let mut histogram = Histogram::new([-1.0, 9.0]);
        (0..100_000).for_each(|i| histogram.count((i % 2000) as f32 / 1000.0 - 1.0));
        histogram.count(9.0);
        let [low, high] = histogram.without_tails();
        assert!((-1.0..-0.98).contains(&low) && (0.98..1.02).contains(&high), "{low} {high}");
        let [low, high] = histogram.least_error();
        assert!(low < -0.99 && high < 8.0, "{low} {high}");
    }
}
