//! What an ONNX file promises: its card, and the names, types and shapes of its inputs and output.
//! Nothing here runs the network.

use dmd_core::card::{CARD_KEY, Classes, INPUT_CLASS, INPUT_Z, ImageSpec, Kind, ModelCard, OUTPUT_X_GEN};
use tract_onnx::pb::tensor_proto::{DataLocation, DataType};
use tract_onnx::pb::tensor_shape_proto::dimension::Value as Dim;
use tract_onnx::pb::type_proto::Value as Type;
use tract_onnx::pb::{GraphProto, ModelProto, ValueInfoProto};

use crate::{Error, Result};

/// What must be known of a generator's file before it can run.
#[derive(Clone, Debug)]
pub struct Contract {
    /// The card, if the file has one.
    pub card: Option<ModelCard>,
    /// Size and range of the images; without a card the size of the graph's input and the range [-1, 1].
    pub image: ImageSpec,
    /// The classes that can be asked for, if the graph has the input for them.
    pub classes: Option<Classes>,
    /// Images per call: 1 where the file does not fix another number.
    pub batch: usize,
}

impl Contract {
    /// Reads the card and checks it against the graph.
    ///
    /// # Errors
    /// A card that does not hold together, a teacher file, inputs or outputs other than a generator's, shapes that
    /// disagree with the card, a file without a card whose shapes do not say enough.
    pub fn read(model: &ModelProto, graph: &GraphProto) -> Result<Self> {
        let text = model.metadata_props.iter().find(|p| p.key == CARD_KEY);
        let card = text.map(|p| ModelCard::from_json(&p.value)).transpose()?;
        if card.as_ref().is_some_and(|c| c.kind == Kind::Teacher) {
            return Err(Error::NotAGenerator(
                "got a teacher file, expected a one-step generator\n\n\
                 hint: export the distilled model, without `--teacher`"
                    .to_owned(),
            ));
        }
        if let Some(w) =
            graph.initializer.iter().find(|w| w.data_location == Some(DataLocation::External as i32))
        {
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
        let known = inputs.iter().all(|i| [INPUT_Z, INPUT_CLASS].contains(&i.name.as_str()));
        let z = inputs.iter().find(|i| known && i.name == INPUT_Z).ok_or_else(|| {
            let got = list(inputs.iter().map(|i| i.name.as_str()));
            Error::NotAGenerator(format!(
                "got inputs {got}, expected `{INPUT_Z}` and perhaps `{INPUT_CLASS}`"
            ))
        })?;
        let shape = shape(z, DataType::Float)?;
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
                "input `{INPUT_Z}` has shape {}, expected {} from the model card",
                shown(&shape),
                shown(&expected)
            )));
        }
        let made = graph.node.iter().any(|n| n.output.iter().any(|o| o == OUTPUT_X_GEN));
        if !made || !graph.output.iter().any(|o| o.name == OUTPUT_X_GEN) {
            let got = list(graph.output.iter().map(|o| o.name.as_str()));
            return Err(Error::NotAGenerator(format!(
                "got outputs {got}, expected `{OUTPUT_X_GEN}` as the result of an operator"
            )));
        }
        let batch = shape[0].filter(|n| *n > 0).unwrap_or(1);
        let classes = match inputs.iter().find(|i| i.name == INPUT_CLASS) {
            None => None,
            Some(input) => {
                let shape = self::shape(input, DataType::Int64)?;
                if shape.first().is_some_and(|n| n.is_some_and(|n| n != batch)) {
                    return Err(Error::NotAGenerator(format!(
                        "input `{INPUT_CLASS}` has shape {}, expected [{batch}] as `{INPUT_Z}`",
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
        Ok(Self { card, image, classes, batch })
    }

    /// `[channels, height, width]`.
    pub fn shape(&self) -> [usize; 3] {
        [self.image.channels, self.image.height, self.image.width]
    }
}

/// The graph's inputs that are not weights (old files list their weights as inputs too).
fn inputs(graph: &GraphProto) -> Vec<&ValueInfoProto> {
    graph.input.iter().filter(|i| !graph.initializer.iter().any(|w| w.name == i.name)).collect()
}

fn list<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<_> = names.map(|n| format!("`{n}`")).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

fn shape(input: &ValueInfoProto, expected: DataType) -> Result<Vec<Option<usize>>> {
    let tensor = input.r#type.as_ref().and_then(|t| t.value.as_ref()).map(|Type::TensorType(t)| t);
    let got = tensor.map_or(0, |t| t.elem_type);
    if got != expected as i32 {
        let got = DataType::try_from(got).unwrap_or(DataType::Undefined);
        return Err(Error::NotAGenerator(format!(
            "input `{}` has type {got:?}, expected {expected:?}",
            input.name
        )));
    }
    let dims = tensor.and_then(|t| t.shape.as_ref()).map(|s| s.dim.as_slice()).unwrap_or_default();
    Ok(dims
        .iter()
        .map(|d| match d.value {
            Some(Dim::DimValue(n)) => usize::try_from(n).ok(),
            _ => None,
        })
        .collect())
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
