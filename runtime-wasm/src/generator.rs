//! A one-step generator, or a teacher, read from the bytes of an ONNX file and run one image at a time.
//! The same code runs natively, where its tests are. Nothing here may know JavaScript, files or clocks.

use bytes::Bytes;
use dmd_core::card::{INPUT_CLASS, INPUT_T, INPUT_X_T, INPUT_Z, Kind};
use dmd_core::noise::{slerp, standard_normal};
use dmd_core::pixels::{self, Image};
use dmd_core::sampler::{Sampler, TEACHER_STEPS, Trajectory};
use dmd_core::schedule::Schedule;
use dmd_engine::Input;
use dmd_engine::message::Model;

use crate::contract::Contract;
use crate::engine::Engine;
use crate::{Error, Result};

/// A model, ready to run.
pub struct Generator {
    engine: Engine,
    contract: Contract,
}

/// Which image is asked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// Seed of the noise.
    pub seed: u32,
    /// Number of the image of that seed.
    pub image: u64,
    /// Its class; without one, the model's classes take turns.
    pub class: Option<usize>,
    /// Another noise, towards which this one goes.
    pub towards: Option<Towards>,
    /// Steps of a teacher (DDIM); [`TEACHER_STEPS`] where there is no number.
    pub steps: Option<usize>,
}

/// The other end of an arc of noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Towards {
    /// Its seed.
    pub seed: u32,
    /// Its image.
    pub image: u64,
    /// How far to go, in [0, 1].
    pub share: f32,
}

/// One generated image.
#[derive(Debug)]
pub struct Sample {
    /// `[channels, height, width]` in the model's range.
    pub values: Vec<f32>,
    /// The class it was asked for, if the model is conditional.
    pub class: Option<usize>,
}

impl Generator {
    /// Reads an ONNX file and prepares it for batches of one image, or of as many as the file fixes, of which all but the
    /// first are thrown away.
    ///
    /// # Errors
    /// Bytes that are not ONNX, a file that is not one of ours (see [`Contract::read`]), an operator that `dmd-export` does
    /// not write.
    pub fn from_bytes(bytes: impl Into<Bytes>) -> Result<Self> {
        let bytes = bytes.into();
        let length = bytes.len();
        let not_onnx = |problem: String| Error::NotOnnx { bytes: length, problem };
        let model = Model::from_bytes(bytes.clone()).map_err(|e| not_onnx(e.to_string()))?;
        let graph = model.graph.as_ref().ok_or_else(|| not_onnx("it holds no graph".to_owned()))?;
        let contract = Contract::read(&model, graph)?;
        let ([c, h, w], n) = (contract.shape(), contract.batch);
        let (image, each) = ([n, c, h, w], [n]);
        let mut inputs = match contract.kind {
            Kind::Generator => vec![Input { name: INPUT_Z, shape: &image }],
            Kind::Teacher => {
                vec![Input { name: INPUT_X_T, shape: &image }, Input { name: INPUT_T, shape: &each }]
            }
        };
        if contract.classes.is_some() {
            inputs.push(Input { name: INPUT_CLASS, shape: &each });
        }
        let engine = Engine::build(model, bytes, &inputs, contract.output)?;
        Ok(Self { engine, contract })
    }

    /// What the file says about itself.
    pub fn contract(&self) -> &Contract {
        &self.contract
    }

    /// The name of the engine that runs it.
    pub fn engine(&self) -> &'static str {
        self.engine.name()
    }

    /// Image `image` of seed `seed`; without a class, the model's classes take turns.
    ///
    /// # Errors
    /// See [`Self::sample`].
    pub fn generate(&self, seed: u32, image: u64, class: Option<usize>) -> Result<Sample> {
        self.sample(&Request { seed, image, class, ..Request::default() })
    }

    /// Generates an image.
    ///
    /// # Errors
    /// A class that the model does not have, or one asked of an unconditional model; steps that it cannot take.
    pub fn sample(&self, request: &Request) -> Result<Sample> {
        let class = self.class_of(request.image, request.class)?;
        let mut x = self.noise(request)?;
        match self.path(request.steps)? {
            None => x = self.evaluate(&x, None, class)?,
            Some(path) => path.run(&mut x, |t, x| self.evaluate(x, Some(t), class), |_, _| {})?,
        }
        Ok(Sample { values: x, class })
    }

    /// The noise of an image, `[channels, height, width]`.
    ///
    /// # Errors
    /// A share that is not in [0, 1].
    pub fn noise(&self, request: &Request) -> Result<Vec<f32>> {
        let mut z = vec![0.0; self.contract.shape().iter().product()];
        standard_normal(request.seed, request.image, &mut z);
        if let Some(Towards { seed, image, share }) = request.towards {
            if !(0.0..=1.0).contains(&share) {
                return Err(Error::request(format!("got share {share}, expected 0 to 1")));
            }
            let (from, mut to) = (z.clone(), vec![0.0; z.len()]);
            standard_normal(seed, image, &mut to);
            slerp(&from, &to, f64::from(share), &mut z);
        }
        Ok(z)
    }

    /// The pixels of a sample, rounded as every runtime rounds them.
    pub fn pixels(&self, sample: &Sample) -> Image {
        pixels::to_image(&sample.values, self.contract.shape(), self.contract.image.range)
    }

    /// The pixels of noise: mid-grey is 0, black and white are three standard deviations away.
    pub fn noise_pixels(&self, noise: &[f32]) -> Image {
        pixels::to_image(noise, self.contract.shape(), [-3.0, 3.0])
    }

    fn class_of(&self, image: u64, class: Option<usize>) -> Result<Option<usize>> {
        match (&self.contract.classes, class) {
            (None, None) => Ok(None),
            (None, Some(class)) => {
                Err(Error::request(format!("got class {class}, expected none: the model is unconditional")))
            }
            (Some(classes), None) => Ok(Some(classes.of_image(image))),
            (Some(classes), Some(class)) if class < classes.count => Ok(Some(class)),
            (Some(classes), Some(class)) => {
                Err(Error::request(format!("got class {class}, expected 0 to {}", classes.count - 1)))
            }
        }
    }

    /// The steps of a teacher; none for a generator.
    fn path(&self, steps: Option<usize>) -> Result<Option<Trajectory>> {
        match (&self.contract.card, self.contract.kind, steps) {
            (Some(card), Kind::Teacher, steps) => {
                let steps = steps.unwrap_or(TEACHER_STEPS.min(card.schedule.num_train_timesteps));
                let (schedule, range) = (Schedule::new(&card.schedule), self.contract.image.range);
                Ok(Some(Trajectory::new(&schedule, Sampler::Ddim, steps, range)?))
            }
            (_, _, None | Some(1)) => Ok(None),
            (_, _, Some(steps)) => Err(Error::request(format!(
                "got {steps} steps, expected 1: the model is a one-step generator"
            ))),
        }
    }

    fn evaluate(&self, x: &[f32], t: Option<usize>, class: Option<usize>) -> Result<Vec<f32>> {
        let n = self.contract.batch;
        let images = x.repeat(n);
        let each = |number: usize| vec![number as f32; n];
        let (t, class) = (t.map(each), class.map(each));
        let mut inputs = vec![&images[..]];
        inputs.extend(t.as_deref().into_iter().chain(class.as_deref()));
        let values = self.engine.run(&inputs, x.len())?;
        if values.iter().any(|v| !v.is_finite()) {
            let output = self.contract.output;
            return Err(Error::Run(format!("`{output}` holds values that are not finite numbers")));
        }
        Ok(values)
    }
}
