//! Reverse-mode differentiation: what was done, in order, and how to undo it.

use std::ops::Range;
use std::sync::Arc;

use super::images::Images;
use super::layout;

/// Images that a network works on, and where their gradient is collected if anybody wants it.
#[derive(Clone)]
pub struct Value {
    pub(super) images: Arc<Images>,
    pub(super) slot: Option<usize>,
}

/// Takes the gradient of an operation's result and adds to those of its arguments.
type Step = Box<dyn FnOnce(Images, &mut Gradients) + Send>;

/// The operations of one forward pass.
#[derive(Default)]
pub struct Tape {
    steps: Vec<(usize, Step)>,
    slots: usize,
}

/// Gradients while the tape is undone.
pub struct Gradients<'a> {
    /// The flattened inputs and parameters of the network.
    pub flat: &'a [f32],
    /// Their gradients.
    pub d_flat: Vec<f32>,
    slots: Vec<Option<Images>>,
}

impl Tape {
    /// A place for one value's gradient.
    pub fn slot(&mut self) -> usize {
        self.slots += 1;
        self.slots - 1
    }

    /// Remembers how to differentiate the operation whose result has the gradient `slot`.
    pub fn push(&mut self, slot: usize, step: impl FnOnce(Images, &mut Gradients) + Send + 'static) {
        self.steps.push((slot, Box::new(step)));
    }

    /// Gradients of everything flattened in `flat`, given that of the result; each step is dropped when it is done.
    pub fn backward(mut self, flat: &[f32], result: Option<usize>, gradient: Images) -> Vec<f32> {
        let mut slots: Vec<Option<Images>> = (0..self.slots).map(|_| None).collect();
        if let Some(result) = result {
            slots[result] = Some(gradient);
        }
        let mut gradients = Gradients { flat, d_flat: vec![0.0; flat.len()], slots };
        while let Some((slot, step)) = self.steps.pop() {
            if let Some(gradient) = gradients.slots[slot].take() {
                step(gradient, &mut gradients);
            }
        }
        gradients.d_flat
    }
}

impl Gradients<'_> {
    /// Adds to the gradient of a value.
    pub fn add(&mut self, slot: Option<usize>, gradient: Images) {
        let Some(slot) = slot else { return };
        match &mut self.slots[slot] {
            Some(sum) => layout::accumulate(sum, &gradient),
            empty => *empty = Some(gradient),
        }
    }

    /// The gradients of two different parameters.
    ///
    /// # Panics
    /// If they overlap.
    pub fn pair(&mut self, first: &Range<usize>, second: &Range<usize>) -> [&mut [f32]; 2] {
        self.d_flat
            .get_disjoint_mut([first.clone(), second.clone()])
            .unwrap_or_else(|_| panic!("parameters {first:?} and {second:?} overlap"))
    }
}
