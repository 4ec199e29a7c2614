//! An ONNX file in the engine of the browser: read, built, and run where it is small.
#![no_main]

use dmd_engine::message::{Model, data_type};
use dmd_engine::{Input, Network};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let model = dmd_fuzz::within(bytes.len(), 64, || Model::from_bytes(bytes.to_vec().into()));
    let Ok(model) = model else { return };
    let Some(graph) = model.graph.clone() else { return };
    let mut shapes = Vec::new();
    for input in graph.input.iter().filter(|i| graph.initializer.iter().all(|w| w.name != i.name)) {
        let Some(tensor) = input.r#type.as_ref().and_then(|t| t.tensor_type.as_ref()) else { return };
        if ![data_type::FLOAT, data_type::INT64].contains(&tensor.elem_type) {
            return;
        }
        let dims = tensor.shape.iter().flat_map(|shape| &shape.dim);
        let shape: Vec<usize> = dims.map(|d| d.dim_value.unwrap_or(1).clamp(1, 64) as usize).collect();
        if shape.len() > 4 || shape.iter().product::<usize>() > 1 << 14 {
            return;
        }
        shapes.push((input.name.clone(), shape));
    }
    let inputs: Vec<Input> = shapes.iter().map(|(name, shape)| Input { name, shape }).collect();
    let outputs: Vec<&str> = graph.output.iter().map(|o| o.name.as_str()).collect();
    // Each stored number may be read several times and packed for whole vectors.
    let network = dmd_fuzz::within(bytes.len(), 1024, || Network::build(model, &inputs, &outputs));
    let Ok(network) = network else { return };
    if network.workspace_len() > 1 << 20 {
        return; // allowed, and slow
    }
    let mut workspace = network.workspace();
    let values: Vec<Vec<f32>> = shapes.iter().map(|(_, s)| vec![0.5; s.iter().product()]).collect();
    let values: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
    let _ = network.run(&mut workspace, &values);
});
