//! What an ONNX file promises: its card, and the names, types and shapes of its inputs and output.
//! Nothing here runs the network.

use dmd_core::card::{
    CARD_KEY, Classes, INPUT_CLASS, INPUT_T, INPUT_X_T, INPUT_Z, ImageSpec, Kind, ModelCard, OUTPUT_X_GEN,
    output_of,
};
use dmd_engine::message::{EXTERNAL, Graph, Model, ValueInfo, data_type};

use crate::{Error, Result};

/// What must be known of a file before it can run.
#[derive(Clone, Debug)]
pub struct Contract {
    /// The card, if the file has one.
    pub card: Option<ModelCard>,
    /// Size and range of the images; without a card the size of the graph's input and the range [-1, 1].
    pub image: ImageSpec,
    /// The classes that can be asked for, if the graph has the input for them.
    pub classes: Option<Classes>,
    /// A one-step generator, or a teacher that takes steps.
    pub kind: Kind,
    /// Name of the output: `x_gen`, or what a teacher predicts.
    pub output: &'static str,
    /// Images per call: 1 where the file does not fix another number.
    pub batch: usize,
}

impl Contract {
    /// Reads the card and checks it against the graph.
    ///
    /// # Errors
    /// A card that does not hold together, inputs or outputs other than those of `docs/onnx.md`, shapes that
    /// disagree with the card, a file without a card whose shapes do not say enough.
    pub fn read(model: &Model, graph: &Graph) -> Result<Self> {
        let text = model.metadata_props.iter().find(|p| p.key == CARD_KEY);
        let card = text.map(|p| ModelCard::from_json(&p.value)).transpose()?;
        let teacher = card.as_ref().filter(|card| card.kind == Kind::Teacher);
        let (image_input, output) = match teacher {
            Some(card) => (INPUT_X_T, output_of(card.schedule.prediction_type)),
            None => (INPUT_Z, OUTPUT_X_GEN),
        };
        let kind = if teacher.is_some() { Kind::Teacher } else { Kind::Generator };
        if let Some(w) = graph.initializer.iter().find(|w| w.data_location == EXTERNAL) {
            return Err(Error::NotAGenerator(format!(
                "weight `{}` lies in another file, expected a single file\n\nhint: export it without `--external-data`",
                w.name
            )));
        }
        if graph.node.iter().any(|node| node.op_type == "QuantizeLinear") {
            return Err(Error::NotAGenerator(
                "its activations are 8-bit integers, which this runtime does not compute\n\nhint: export it with `--dtype int8`"
                    .to_owned(),
            ));
        }
        let inputs = inputs(graph);
        let needed = if teacher.is_some() { &[INPUT_X_T, INPUT_T][..] } else { &[INPUT_Z] };
        let known = inputs.iter().all(|i| i.name == INPUT_CLASS || needed.contains(&i.name.as_str()))
            && needed.iter().all(|name| inputs.iter().any(|i| i.name == *name));
        let z = inputs.iter().find(|i| known && i.name == image_input).ok_or_else(|| {
            let got = list(inputs.iter().map(|i| i.name.as_str()));
            let expected = needed.join("` and `");
            Error::NotAGenerator(format!(
                "got inputs {got}, expected `{expected}` and perhaps `{INPUT_CLASS}`"
            ))
        })?;
        let shape = shape(z, data_type::FLOAT)?;
        let image = match &card {
            Some(card) => card.image.clone(),
            None => image_of(&shape)?,
        };
        let expected = [None, Some(image.channels), Some(image.height), Some(image.width)];
        let fits = |(got, expected): (&Option<usize>, &Option<usize>)| {
            got.is_none() || expected.is_none() || got == expected
        };
        if shape.len() != 4 || !shape.iter().zip(&expected).all(fits) {
            return Err(Error::NotAGenerator(format!(
                "input `{image_input}` has shape {}, expected {} from the model card",
                shown(&shape),
                shown(&expected)
            )));
        }
        let made = graph.node.iter().any(|n| n.output.iter().any(|o| o == output));
        if !made || !graph.output.iter().any(|o| o.name == output) {
            let got = list(graph.output.iter().map(|o| o.name.as_str()));
            return Err(Error::NotAGenerator(format!(
                "got outputs {got}, expected `{output}` as the result of an operator"
            )));
        }
        let batch = shape[0].filter(|n| *n > 0).unwrap_or(1);
        let classes = match inputs.iter().find(|i| i.name == INPUT_CLASS) {
            None => None,
            Some(input) => {
                let shape = self::shape(input, data_type::INT64)?;
                if shape.first().is_some_and(|n| n.is_some_and(|n| n != batch)) {
                    return Err(Error::NotAGenerator(format!(
                        "input `{INPUT_CLASS}` has shape {}, expected [{batch}] as `{image_input}`",
                        shown(&shape)
                    )));
                }
                let known = card.as_ref().and_then(|c| c.provenance.classes.clone());
                Some(known.ok_or_else(|| {
                    Error::NotAGenerator(format!(
                        "the graph has the input `{INPUT_CLASS}`, but the file does not say which classes there are"
                    ))
                })?)
            }
        };
        Ok(Self { card, image, classes, kind, output, batch })
    }

    /// `[channels, height, width]`.
    pub fn shape(&self) -> [usize; 3] {
        [self.image.channels, self.image.height, self.image.width]
    }
}

/// The graph's inputs that are not weights (old files list their weights as inputs too).
fn inputs(graph: &Graph) -> Vec<&ValueInfo> {
    graph.input.iter().filter(|i| !graph.initializer.iter().any(|w| w.name == i.name)).collect()
}

fn list<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<_> = names.map(|n| format!("`{n}`")).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

fn shape(input: &ValueInfo, expected: i32) -> Result<Vec<Option<usize>>> {
    let tensor = input.r#type.as_ref().and_then(|t| t.tensor_type.as_ref());
    let got = tensor.map_or(0, |t| t.elem_type);
    if got != expected {
        return Err(Error::NotAGenerator(format!(
            "input `{}` has type {}, expected {}",
            input.name,
            data_type::name(got),
            data_type::name(expected)
        )));
    }
    let dims = tensor.and_then(|t| t.shape.as_ref()).map(|s| s.dim.as_slice()).unwrap_or_default();
    Ok(dims.iter().map(|d| d.dim_value.and_then(|n| usize::try_from(n).ok())).collect())
}

fn image_of(shape: &[Option<usize>]) -> Result<ImageSpec> {
    match shape {
        [_, Some(channels), Some(height), Some(width)]
            if [channels, height, width].iter().all(|n| **n > 0) =>
        {
            Ok(ImageSpec { channels: *channels, height: *height, width: *width, range: [-1.0, 1.0] })
        }
        _ => Err(Error::NotAGenerator(format!(
            "got no model card, and input `{INPUT_Z}` has shape {}, which does not say the size of an image",
            shown(shape)
        ))),
    }
}

fn shown(shape: &[Option<usize>]) -> String {
    let dims: Vec<_> = shape.iter().map(|d| d.map_or("n".to_owned(), |n| n.to_string())).collect();
    format!("[{}]", dims.join(", "))
}
