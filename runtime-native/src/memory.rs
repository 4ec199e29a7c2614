//! How much memory a plan of tract takes, told before anything is computed: tract evaluates what depends on constants while it
//! builds a plan, so that a file of some bytes could ask for all there is. The sizes are those of tract's own shape rules.

use tract_onnx::prelude::*;
use tract_onnx::tract_hir::infer::{Factoid, InferenceFact, InferenceModel, InferenceNode};

use dmd_engine::MAX_VALUES;

/// Numbers that may be alive at once: 4 GiB of f32.
const MAX_ALIVE: u64 = 1 << 30;

/// Infers every value in turn and refuses one that is too large before it is computed.
///
/// # Errors
/// A size beyond the limits, one that cannot be told, or whatever tract says to the graph.
pub(crate) fn check(model: &mut InferenceModel) -> TractResult<()> {
    let successors = |node: &InferenceNode| node.outputs.iter().map(|o| o.successors.len()).sum();
    let mut waiting: Vec<usize> = model.nodes().iter().map(successors).collect();
    let mut sizes = vec![0u64; waiting.len()];
    let mut alive = 0u64;
    for id in model.eval_order()? {
        sizes[id] = infer(model, id)?;
        alive += sizes[id];
        if alive > MAX_ALIVE {
            let name = &model.node(id).name;
            return Err(TractError::msg(format!(
                "{alive} numbers are alive at `{name}`, expected at most {MAX_ALIVE}"
            )));
        }
        for input in &model.node(id).inputs {
            waiting[input.node] = waiting[input.node].saturating_sub(1);
            if waiting[input.node] == 0 {
                alive -= std::mem::take(&mut sizes[input.node]);
            }
        }
    }
    Ok(())
}

/// One step of tract's analysis: what a node and the values around it are, computed where its inputs are constant and
/// nothing is too large. Returns how many numbers the node makes.
fn infer(model: &mut InferenceModel, id: usize) -> TractResult<u64> {
    let node = model.node(id);
    let outputs = (0..node.outputs.len()).map(|slot| OutletId::new(id, slot));
    let observed = node.op.observe_outlets(model, node)?;
    let outlets = [node.inputs.to_vec(), outputs.collect(), observed];
    let facts = |outlets: &Vec<OutletId>| -> TractResult<Vec<InferenceFact>> {
        outlets.iter().map(|outlet| model.outlet_fact(*outlet).cloned()).collect()
    };
    let [inputs, outputs, observed] = [facts(&outlets[0])?, facts(&outlets[1])?, facts(&outlets[2])?];
    let known = (inputs.iter().collect(), outputs.iter().collect(), observed.iter().collect());
    let mut known = model.node_mut(id).op.infer_facts(known.0, known.1, known.2)?;
    let constant = !inputs.is_empty() && inputs.iter().all(|fact| fact.value.is_concrete());
    let size = made(model.node(id), &known.0, &known.1, constant)?;
    if constant {
        let facts = (inputs.iter().collect(), outputs.iter().collect(), observed.iter().collect());
        known = model.node_mut(id).op.infer(facts.0, facts.1, facts.2)?;
    }
    for (outlet, fact) in outlets.iter().flatten().zip([known.0, known.1, known.2].iter().flatten()) {
        let unified = fact.unify(model.outlet_fact(*outlet)?)?;
        model.set_outlet_fact(*outlet, unified)?;
    }
    Ok(size)
}

/// Numbers that a node makes, the scratch space of convolutions included.
fn made(
    node: &InferenceNode,
    inputs: &[InferenceFact],
    outputs: &[InferenceFact],
    constant: bool,
) -> TractResult<u64> {
    let too_large = |values: u64, limit: u64| {
        let (name, op) = (&node.name, node.op.name());
        Err(TractError::msg(format!("`{name}` ({op}) has {values} numbers, expected at most {limit}")))
    };
    let mut total = 0u64;
    for fact in outputs {
        match volume(fact) {
            Some(values) if values > MAX_VALUES as u64 => return too_large(values, MAX_VALUES as u64),
            Some(values) => total += values,
            None if constant => {
                let (name, op) = (&node.name, node.op.name());
                let problem = format!("the size of `{name}` ({op}) cannot be told before it is computed");
                return Err(TractError::msg(problem));
            }
            None => {}
        }
    }
    if let Some(values) = range(&node.op.name(), inputs).filter(|values| *values > MAX_VALUES as u64) {
        return too_large(values, MAX_VALUES as u64);
    }
    let name = node.op.name();
    if name.contains("Conv") && inputs.len() > 1 && outputs.len() == 1 {
        let (columns, positions) = match name.contains("Transpose") {
            true => (&outputs[0], &inputs[0]),
            false => (&inputs[0], &outputs[0]),
        };
        if let (Some(columns), Some(positions), Some(kernel)) =
            (shape(columns), shape(positions), shape(&inputs[1]))
            && columns.len() > 1
            && positions.len() > 1
            && kernel.len() > 1
        {
            let numbers = [&columns[1..2], &kernel[2..], &positions[..1], &positions[2..]].concat();
            let scratch = numbers.iter().fold(1u64, |n, d| n.saturating_mul(*d));
            if scratch > MAX_ALIVE {
                return too_large(scratch, MAX_ALIVE);
            }
        }
    }
    Ok(total)
}

/// Numbers of a constant `Range`, for which tract's rule is wrong beyond some length.
fn range(op: &str, inputs: &[InferenceFact]) -> Option<u64> {
    let number = |fact: &InferenceFact| fact.value.concretize()?.cast_to_scalar::<f64>().ok();
    match inputs {
        [start, end, step] if op == "Range" => {
            Some(((number(end)? - number(start)?) / number(step)?).ceil() as u64)
        }
        _ => None,
    }
}

/// The dimensions, if all are known.
fn shape(fact: &InferenceFact) -> Option<Vec<u64>> {
    let dims = fact.shape.concretize()?;
    dims.iter().map(|d| d.to_i64().ok().and_then(|d| u64::try_from(d).ok())).collect()
}

fn volume(fact: &InferenceFact) -> Option<u64> {
    Some(shape(fact)?.iter().fold(1u64, |n, d| n.saturating_mul(*d)))
}
