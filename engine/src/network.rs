//! A network ready to run: its steps, and where in memory their values lie.

use std::sync::Arc;

use crate::build::{self, Operand, Step};
use crate::message::Model;
use crate::{Error, Result};

/// An input with the shape that it has in every call. Integers are passed as floats.
#[derive(Clone, Debug)]
pub struct Input<'a> {
    /// Its name in the file.
    pub name: &'a str,
    /// Its shape.
    pub shape: &'a [usize],
}

/// Numbers that the memory of one thread may have: 4 GiB.
const MAX_MEMORY: usize = 1 << 30;

/// A network for inputs of one shape. It never changes; each run at the same time has a [`Workspace`] of its own.
pub struct Network {
    steps: Vec<Placed>,
    buffers: Vec<usize>,
    inputs: Vec<Place>,
    outputs: Vec<(Place, Vec<usize>)>,
    scratch: usize,
}

/// Floats of a cache line.
const ALIGNMENT: usize = 16;

/// The memory of one run at a time.
pub struct Workspace {
    buffers: Vec<Vec<f32>>,
    scratch: Vec<f32>,
}

/// A buffer, and how much of it a value takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    buffer: usize,
    len: usize,
}

enum Source {
    Place(Place),
    Known(Arc<[f32]>),
}

struct Placed {
    step: Step,
    inputs: Vec<Source>,
    output: Place,
    in_place: bool,
}

impl Network {
    /// Builds what `outputs` need. Weights are taken out of `model`.
    ///
    /// # Errors
    /// An operator or a form of one that `docs/onnx.md` does not have, shapes that do not fit, values in another file,
    /// sizes beyond measure.
    pub fn build(model: Model, inputs: &[Input], outputs: &[&str]) -> Result<Self> {
        let built = build::build(model, inputs, outputs)?;
        let sizes = &built.sizes;
        if let Some(step) = built.steps.iter().find(|step| sizes[step.output] == 0) {
            return Err(Error::Graph(format!("node `{}`: gives no values, expected some", step.node)));
        }
        let mut last = vec![0; sizes.len()];
        for (i, step) in built.steps.iter().enumerate() {
            for input in &step.inputs {
                if let Operand::Value(value) = input {
                    last[*value] = i;
                }
            }
        }
        for (value, _) in &built.outputs {
            last[*value] = usize::MAX;
        }
        let mut memory = Memory::default();
        let mut places: Vec<Option<Place>> = vec![None; sizes.len()];
        for value in &built.inputs {
            places[*value] = Some(memory.take(sizes[*value]));
        }
        let missing = || Error::Graph("a value is read before it is computed".to_owned());
        let mut steps = Vec::with_capacity(built.steps.len());
        let mut scratch = 0;
        for (i, step) in built.steps.into_iter().enumerate() {
            scratch = scratch.max(step.operator.scratch());
            let sources = step.inputs.iter().map(|input| match input {
                Operand::Known(values) => Ok(Source::Known(values.clone())),
                Operand::Value(value) => places[*value].map(Source::Place).ok_or_else(missing),
            });
            let sources = sources.collect::<Result<Vec<_>>>()?;
            let mut ending: Vec<usize> = step.inputs.iter().filter_map(Operand::value).collect();
            ending.retain(|value| last[*value] == i);
            ending.sort_unstable();
            ending.dedup();
            let first = step.inputs.first().and_then(Operand::value);
            let reuse = first.filter(|value| {
                step.operator.in_place()
                    && ending.contains(value)
                    && sizes[*value] == sizes[step.output]
                    && !step.inputs[1..].iter().any(|other| other.value() == Some(*value))
            });
            let output = match reuse.and_then(|value| places[value]) {
                Some(place) => place,
                None => memory.take(sizes[step.output]),
            };
            places[step.output] = Some(output);
            for value in ending.into_iter().filter(|value| Some(*value) != reuse) {
                memory.give_back(places[value]);
            }
            if last[step.output] == 0 {
                memory.give_back(places[step.output]);
            }
            steps.push(Placed { step, inputs: sources, output, in_place: reuse.is_some() });
        }
        let memory = memory.sizes;
        let total = memory.iter().fold(scratch, |n, size| n.saturating_add(*size));
        if total > MAX_MEMORY {
            return Err(Error::Graph(format!(
                "it takes memory for {total} numbers, expected at most {MAX_MEMORY}"
            )));
        }
        let place = |value: usize| places[value].ok_or_else(missing);
        let outputs = built.outputs.iter().map(|(value, shape)| Ok((place(*value)?, shape.clone())));
        Ok(Self {
            steps,
            inputs: built.inputs.iter().map(|value| place(*value)).collect::<Result<_>>()?,
            outputs: outputs.collect::<Result<_>>()?,
            buffers: memory,
            scratch,
        })
    }

    /// Numbers of a workspace, 4 bytes each.
    pub fn workspace_len(&self) -> usize {
        self.buffers.iter().sum::<usize>() + self.scratch
    }

    /// Memory for running it.
    pub fn workspace(&self) -> Workspace {
        let buffers = self.buffers.iter().map(|&size| vec![0.0; size]).collect();
        Workspace { buffers, scratch: vec![0.0; self.scratch + ALIGNMENT] }
    }

    /// The shapes of the outputs.
    pub fn output_shapes(&self) -> impl Iterator<Item = &[usize]> {
        self.outputs.iter().map(|(_, shape)| shape.as_slice())
    }

    /// Runs it; the outputs lie in `workspace` until its next run.
    ///
    /// With the feature `threads` all threads of the rayon pool take part in which this is called (`pool.install`); one that waits
    /// for the others may begin another task of the pool, so hold nothing locked that such a task needs.
    ///
    /// # Errors
    /// Inputs of another size, an index that is out of range.
    pub fn run<'a>(&self, workspace: &'a mut Workspace, inputs: &[&[f32]]) -> Result<Vec<&'a [f32]>> {
        let Workspace { buffers, scratch } = workspace;
        // Vectors of panels then never lie across two cache lines.
        let skipped = scratch.as_ptr().align_offset(size_of::<f32>() * ALIGNMENT);
        let scratch = scratch.get_mut(skipped..).unwrap_or_default();
        let expected: Vec<usize> = self.inputs.iter().map(|place| place.len).collect();
        let got: Vec<usize> = inputs.iter().map(|input| input.len()).collect();
        if got != expected {
            return Err(Error::Graph(format!("got inputs of {got:?} values, expected {expected:?}")));
        }
        for (place, input) in self.inputs.iter().zip(inputs) {
            buffers[place.buffer][..place.len].copy_from_slice(input);
        }
        crate::parallel::awake(|| self.steps(buffers, scratch))?;
        Ok(self.outputs.iter().map(|(place, _)| &buffers[place.buffer][..place.len]).collect())
    }

    fn steps(&self, buffers: &mut [Vec<f32>], scratch: &mut [f32]) -> Result<()> {
        for placed in &self.steps {
            let Place { buffer, len } = placed.output;
            let mut out = std::mem::take(&mut buffers[buffer]);
            let skipped = usize::from(placed.in_place);
            let operands: Vec<&[f32]> = placed.inputs[skipped..]
                .iter()
                .map(|source| match source {
                    Source::Place(place) => &buffers[place.buffer][..place.len],
                    Source::Known(values) => values,
                })
                .collect();
            let Step { operator, node, .. } = &placed.step;
            let done = if placed.in_place {
                operator.run_in_place(&mut out[..len], &operands);
                Ok(())
            } else {
                operator.run(&operands, &mut out[..len], scratch)
            };
            done.map_err(|problem| Error::Graph(format!("node `{node}`: {problem}")))?;
            buffers[buffer] = out;
        }
        Ok(())
    }

    /// The same on the calling thread alone: for runs beside each other, one on every thread of a pool.
    ///
    /// # Errors
    /// As [`Self::run`].
    #[cfg(feature = "threads")]
    pub fn run_alone<'a>(&self, workspace: &'a mut Workspace, inputs: &[&[f32]]) -> Result<Vec<&'a [f32]>> {
        crate::parallel::alone(|| self.run(workspace, inputs))
    }
}

/// Buffers, handed out and taken back while steps are placed.
#[derive(Default)]
struct Memory {
    sizes: Vec<usize>,
    free: Vec<usize>,
}

impl Memory {
    /// The smallest free buffer that is large enough, else the largest, made larger, else a new one.
    fn take(&mut self, len: usize) -> Place {
        let fits = self.free.iter().enumerate().filter(|(_, buffer)| self.sizes[**buffer] >= len);
        let best = fits.min_by_key(|(_, buffer)| self.sizes[**buffer]).map(|(i, _)| i);
        let largest =
            self.free.iter().enumerate().max_by_key(|(_, buffer)| self.sizes[**buffer]).map(|(i, _)| i);
        let buffer = match best.or(largest) {
            Some(i) => self.free.swap_remove(i),
            None => {
                self.sizes.push(0);
                self.sizes.len() - 1
            }
        };
        self.sizes[buffer] = self.sizes[buffer].max(len);
        Place { buffer, len }
    }

    fn give_back(&mut self, place: Option<Place>) {
        self.free.extend(place.map(|place| place.buffer));
    }
}
