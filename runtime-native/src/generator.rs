//! From a seed to images: the noise contract, the classes, one step of a generator or the many of a teacher.
//! Engines differ in how many images they take at once; image `k` of a seed does not depend on that.

use std::path::{Path, PathBuf};
#[cfg(feature = "ort")]
use std::sync::{Mutex, PoisonError};

use dmd_core::card::{Classes, Kind};
use dmd_core::noise::{slerp, standard_normal, step_noise};
use dmd_core::pixels::{Image, to_image};
use dmd_core::sampler::{Sampler, TEACHER_STEPS, Trajectory};
use dmd_core::schedule::Schedule;

use crate::batch::Batch;
use crate::embedded::Embedded;
use crate::file::{ModelFile, ModelInfo};
use crate::providers::{self, Choice, Provider};
use crate::{Error, Result};

/// Bytes of images that [`parts`] puts into one request.
const PART_BYTES: usize = 16 << 20;

/// Pixels (rows times columns) that one onnxruntime batch holds at most; a batch is 1 to 64 images.
#[cfg(feature = "ort")]
const BATCH_PIXELS: usize = 64 * 32 * 32;

/// How to run a model.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// What runs the network.
    pub provider: Provider,
    /// Threads of the engine; `None` is one per core.
    pub threads: Option<usize>,
    /// The onnxruntime library to load; `None` searches, see [`crate::library`].
    pub ort_lib: Option<PathBuf>,
    /// Folder where TensorRT keeps the engines it builds; `None` is `dmd/tensorrt` in the user's cache folder.
    pub trt_cache: Option<PathBuf>,
}

/// What to generate: images `first .. first + count` of a seed.
#[derive(Clone, Debug)]
pub struct Request {
    /// Seed of the noise.
    pub seed: u32,
    /// Index of the first image.
    pub first: u64,
    /// Number of images, at least 1.
    pub count: usize,
    /// Class of the images.
    pub class: Class,
    /// Steps per image; `None` is 1 for a generator, [`TEACHER_STEPS`] for a teacher.
    pub steps: Option<usize>,
    /// What a teacher's steps are.
    pub sampler: Sampler,
    /// Classifier-free guidance of a teacher: `none + guidance·(class − none)` of its predictions; 1 is the class
    /// alone. Ho and Salimans 2022 (arXiv:2207.12598), Eq. 6 with `guidance = 1 + w`.
    pub guidance: f64,
    /// Noise between that of two seeds instead of the seed's images.
    pub interpolation: Option<Interpolation>,
}

/// Noise on the great arc from image 0 of the request's seed to image 0 of another seed, see [`slerp`]: image `k` of
/// the request lies at `k / (frames - 1)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interpolation {
    /// Seed at the far end.
    pub to: u32,
    /// Images from one end to the other with both, at least 2.
    pub frames: u64,
}

/// Which class each image has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Image `k` has class `k mod count`, or none in a model without classes. In an interpolation all have class 0.
    Cycle,
    /// All images have this one.
    One(usize),
}

/// Generated images.
#[derive(Clone, Debug)]
pub struct Images {
    /// `[n, c, h, w]` in the model's range.
    pub values: Vec<f32>,
    /// `[c, h, w]`.
    pub shape: [usize; 3],
    /// Values of black and white.
    pub range: [f32; 2],
}

/// A model loaded into an engine. Threads share it: engines compiled in run their requests side by side, onnxruntime in
/// turn.
pub struct Generator {
    info: ModelInfo,
    choice: Choice,
    engine: Engine,
}

/// What runs the network.
pub(crate) enum Engine {
    Embedded(Embedded),
    #[cfg(feature = "ort")]
    Ort(Mutex<crate::ort::Ort>),
}

impl Request {
    /// Images `0..count` of a seed, in turn of every class, by the model's usual number of DDIM steps without guidance.
    pub fn new(seed: u32, count: usize) -> Self {
        let (class, sampler) = (Class::Cycle, Sampler::Ddim);
        Self { seed, first: 0, count, class, steps: None, sampler, guidance: 1.0, interpolation: None }
    }
}

impl Options {
    /// `threads`, or one per core.
    pub fn threads(&self) -> usize {
        self.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
    }
}

impl Images {
    /// Number of images.
    pub fn count(&self) -> usize {
        self.values.len() / self.shape.iter().product::<usize>()
    }

    /// The images as bytes.
    pub fn pixels(&self) -> Vec<Image> {
        let len = self.shape.iter().product();
        self.values.chunks(len).map(|v| to_image(v, self.shape, self.range)).collect()
    }
}

impl Generator {
    /// Reads a file and loads it into an engine.
    pub fn open(path: &Path, options: &Options) -> Result<Self> {
        Self::load(ModelFile::read(path)?, options)
    }

    /// Loads a model that was read already.
    pub fn load(file: ModelFile, options: &Options) -> Result<Self> {
        let (engine, choice) = providers::open(&file, options)?;
        Ok(Self { info: file.info, choice, engine })
    }

    /// What the file says about itself.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// The provider that was taken.
    pub fn choice(&self) -> &Choice {
        &self.choice
    }

    /// One evaluation of the network: what the file's graph makes of these inputs, `[n, c, h, w]`.
    ///
    /// # Errors
    /// Inputs that do not fill `[n, …]`, or an engine that fails.
    pub fn evaluate(&self, batch: &Batch) -> Result<Vec<f32>> {
        let len = self.info.image_len();
        if batch.x.len() != batch.n * len || batch.t.len() != batch.n || batch.class.len() != batch.n {
            let got = [batch.x.len(), batch.t.len(), batch.class.len()];
            return Err(Error::Request(format!("got {got:?} values, expected those of {} images", batch.n)));
        }
        match &self.engine {
            Engine::Embedded(engine) => engine.run(batch),
            #[cfg(feature = "ort")]
            Engine::Ort(engine) => engine.lock().unwrap_or_else(PoisonError::into_inner).run(batch),
        }
    }

    /// Generates the images `0..count` of a seed: [`Generator::sample`] with what [`Request::new`] takes for the rest.
    ///
    /// # Errors
    /// As [`Generator::sample`].
    pub fn generate(&self, seed: u32, count: usize, class: Class) -> Result<Images> {
        self.sample(&Request { class, ..Request::new(seed, count) }, &|_| {})
    }

    /// Generates the images of a request. `progress` hears how many network evaluations of single images were done since it was last
    /// called; there are `count` times [`evaluations`] in all.
    ///
    /// # Errors
    /// A request the model cannot meet, or an engine that fails or returns values that are not finite.
    pub fn sample(&self, request: &Request, progress: &(dyn Fn(usize) + Sync)) -> Result<Images> {
        let plan = Plan::new(&self.info, request)?;
        let len = self.info.image_len();
        let mut values = allocate(request.count, len)?;
        match &self.engine {
            Engine::Embedded(engine) => {
                engine.for_each(&mut values, len, |start, x, run| plan.sample(start, x, run, progress))?
            }
            #[cfg(feature = "ort")]
            Engine::Ort(engine) => {
                let pixels = self.info.image.height * self.info.image.width;
                let batch = self.info.batch.unwrap_or((BATCH_PIXELS / pixels).clamp(1, 64));
                let mut engine = engine.lock().unwrap_or_else(PoisonError::into_inner);
                for (i, x) in values.chunks_mut(batch * len).enumerate() {
                    plan.sample(i * batch, x, &mut |b| engine.run(b), progress)?;
                }
            }
        }
        Ok(Images { values, shape: self.info.image_shape(), range: self.info.image.range })
    }
}

/// Splits a request into such that fit into memory one after the other; the images are the same.
pub fn parts<'a>(info: &ModelInfo, request: &'a Request) -> impl Iterator<Item = Request> + use<'a> {
    let per_part = (PART_BYTES / size_of::<f32>() / info.image_len()).clamp(1, 1 << 12);
    let batch = info.batch.unwrap_or(64);
    let per_part = per_part.next_multiple_of(batch);
    (0..request.count).step_by(per_part).map(move |start| Request {
        first: request.first + start as u64,
        count: per_part.min(request.count - start),
        ..request.clone()
    })
}

/// Checks a step count against the kind of the model; returns the one to take.
pub fn steps(info: &ModelInfo, asked: Option<usize>) -> Result<usize> {
    let total = info.card.as_ref().map_or(1, |c| c.schedule.num_train_timesteps);
    match (info.kind, asked) {
        (Kind::Generator, None | Some(1)) => Ok(1),
        (Kind::Generator, Some(got)) => Err(Error::Request(format!(
            "got {got} steps, expected 1: {} is a one-step generator\n\nhint: `dmd-export --teacher` writes the teacher \
             it was distilled from, which takes any number of steps",
            info.name
        ))),
        (Kind::Teacher, None) => Ok(TEACHER_STEPS.min(total)),
        (Kind::Teacher, Some(got)) if (1..=total).contains(&got) => Ok(got),
        (Kind::Teacher, Some(got)) => {
            Err(Error::Request(format!("got {got} steps, expected 1 to {total} from the model card")))
        }
    }
}

/// Network evaluations per image of a request, a guided one counted once.
///
/// # Errors
/// A request the model cannot meet.
pub fn evaluations(info: &ModelInfo, request: &Request) -> Result<usize> {
    Ok(Plan::new(info, request)?.path.map_or(1, |path| path.evaluations()))
}

/// Finds a class by number or name; in a file without a card any number is taken.
pub fn find_class(info: &ModelInfo, text: &str) -> Result<usize> {
    if !info.takes_class() {
        return Err(Error::Request(format!(
            "got class `{text}`, expected none: {} has no classes",
            info.name
        )));
    }
    match classes(info) {
        Some(classes) => Ok(classes.find(text)?),
        None => text.parse().map_err(|_| {
            Error::Request(format!("got class `{text}`, expected a number: {} has no model card", info.name))
        }),
    }
}

/// The classes of a model, if its card names them.
pub fn classes(info: &ModelInfo) -> Option<&Classes> {
    info.card.as_ref().and_then(|card| card.provenance.classes.as_ref())
}

fn allocate(count: usize, len: usize) -> Result<Vec<f32>> {
    let too_many = || Error::Request(format!("got {count} images, which do not fit into memory"));
    if count == 0 {
        return Err(Error::Request("got 0 images, expected at least 1".to_owned()));
    }
    let total = count.checked_mul(len).ok_or_else(too_many)?;
    let mut values = Vec::new();
    values.try_reserve_exact(total).map_err(|_| too_many())?;
    values.resize(total, 0.0);
    Ok(values)
}

/// A checked request.
struct Plan<'a> {
    info: &'a ModelInfo,
    request: &'a Request,
    /// Steps of a teacher; none for a generator.
    path: Option<Trajectory>,
    /// The class that stands for none, if predictions are guided.
    none: Option<i64>,
}

impl<'a> Plan<'a> {
    fn new(info: &'a ModelInfo, request: &'a Request) -> Result<Self> {
        let steps = steps(info, request.steps)?;
        let path = match (&info.card, info.kind) {
            (Some(card), Kind::Teacher) => {
                let schedule = Schedule::new(&card.schedule);
                Some(Trajectory::new(&schedule, request.sampler, steps, info.image.range)?)
            }
            _ => None,
        };
        let none = classes(info).and_then(|classes| classes.none).filter(|_| path.is_some());
        let guided = request.guidance != 1.0;
        if !request.guidance.is_finite() || (guided && none.is_none()) {
            return Err(Error::Request(format!(
                "got guidance {}, expected 1: {} {}",
                request.guidance,
                info.name,
                if path.is_some() {
                    "was not trained with a class that stands for none"
                } else {
                    "takes one step; guidance was part of its distillation"
                }
            )));
        }
        let none = none.filter(|_| guided).map(|none| none as i64);
        if let Some(Interpolation { frames, .. }) = request.interpolation
            && (frames < 2 || request.first + request.count as u64 > frames)
        {
            return Err(Error::Request(format!(
                "got images {} to {} of an interpolation of {frames}, expected at least 2 images and none beyond the last",
                request.first,
                request.first + request.count as u64 - 1
            )));
        }
        match (info.takes_class(), classes(info), request.class) {
            (true, None, Class::Cycle) => {
                return Err(Error::Request(format!(
                    "got no class, expected one: {} asks for it and has no model card that counts them\n\nhint: \
                     `--class N`",
                    info.name
                )));
            }
            (true, Some(classes), Class::One(c)) if c >= classes.count => {
                return Err(Error::Request(format!("got class {c}, expected 0 to {}", classes.count - 1)));
            }
            (true, None, Class::One(c)) if i64::try_from(c).is_err() => {
                return Err(Error::Request(format!("got class {c}, expected 0 to {}", i64::MAX)));
            }
            (false, _, Class::One(c)) => {
                return Err(Error::Request(format!(
                    "got class {c}, expected none: {} has no classes",
                    info.name
                )));
            }
            _ => {}
        }
        Ok(Self { info, request, path, none })
    }

    /// Fills `x` with the images that start at the request's image `start`.
    fn sample(
        &self,
        start: usize,
        x: &mut [f32],
        run: &mut dyn FnMut(&Batch) -> Result<Vec<f32>>,
        progress: &dyn Fn(usize),
    ) -> Result<()> {
        let n = x.len() / self.info.image_len();
        let first = self.request.first + start as u64;
        let class: Vec<i64> = (first..).take(n).map(|k| self.class_of(k) as i64).collect();
        for (k, z) in (first..).zip(x.chunks_mut(self.info.image_len())) {
            self.noise(k, z);
        }
        let Some(path) = &self.path else {
            let x_gen = self.checked(run(&Batch { n, x, t: &[], class: &class })?, x.len(), first)?;
            x.copy_from_slice(&x_gen);
            progress(n);
            return Ok(());
        };
        let predict = |t: usize, x: &[f32]| {
            let t = vec![t as f32; n];
            let mut prediction = self.checked(run(&Batch { n, x, t: &t, class: &class })?, x.len(), first)?;
            if let Some(none) = self.none {
                let class = vec![none; n];
                let plain = self.checked(run(&Batch { n, x, t: &t, class: &class })?, x.len(), first)?;
                let guidance = self.request.guidance as f32;
                prediction.iter_mut().zip(plain).for_each(|(p, plain)| *p = plain + guidance * (*p - plain));
            }
            progress(n);
            Ok(prediction)
        };
        let noise = |step: usize, out: &mut [f32]| {
            for (k, out) in (first..).zip(out.chunks_mut(self.info.image_len())) {
                // the frames of an interpolation share this noise, or they would not follow each other
                let k = if self.request.interpolation.is_some() { 0 } else { k };
                step_noise(self.request.seed, k, step, out);
            }
        };
        path.run(x, predict, noise)
    }

    /// The noise that image `k` starts from.
    fn noise(&self, k: u64, z: &mut [f32]) {
        let Some(Interpolation { to, frames }) = self.request.interpolation else {
            return standard_normal(self.request.seed, k, z);
        };
        let (mut a, mut b) = (vec![0.0; z.len()], vec![0.0; z.len()]);
        standard_normal(self.request.seed, 0, &mut a);
        standard_normal(to, 0, &mut b);
        slerp(&a, &b, k as f64 / (frames - 1) as f64, z);
    }

    fn class_of(&self, k: u64) -> usize {
        match self.request.class {
            Class::One(class) => class,
            Class::Cycle if self.request.interpolation.is_some() => 0,
            Class::Cycle => classes(self.info).map_or(0, |c| c.of_image(k)),
        }
    }

    fn checked(&self, values: Vec<f32>, len: usize, first: u64) -> Result<Vec<f32>> {
        if values.len() != len {
            let problem = format!("its output has {} values, expected {len}", values.len());
            return Err(Error::File { name: self.info.name.clone(), problem });
        }
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(at) => {
                let k = first + (at / self.info.image_len()) as u64;
                let problem = format!("image {k} of seed {} came out as {}", self.request.seed, values[at]);
                Err(Error::File { name: self.info.name.clone(), problem })
            }
        }
    }
}
