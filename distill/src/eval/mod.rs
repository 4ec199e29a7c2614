//! `dmd-distill eval`: how far generated images are from real ones, beside the teacher's and the least possible distance.
//! Must not compute a metric itself: those are in [`crate::metrics`].

mod draw;
pub mod inception;
pub mod npy;
mod pictures;
mod scorer;
mod subject;
mod table;

use std::path::{Path, PathBuf};

use candle_core::Device;
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::checkpoint::Checkpoint;
use crate::data::{Source, Split};
use crate::error::{Error, Result};
use crate::share::Share;
use crate::{device, progress};

pub use pictures::Pictures;
pub use scorer::{Extractor, Scorer, Scores};

/// Images per feature below which a Fréchet distance is mostly bias.
const ENOUGH: usize = 10;

/// A judgement of generated images.
#[derive(Clone, Debug, Args)]
pub struct EvalArgs {
    /// Run folder, generator folder, or a base: a preset or a folder in diffusers layout
    #[arg(value_name = "DIR|NAME", required_unless_present = "images")]
    pub model: Option<String>,
    /// Score these images instead: f32 `[n, c, h, w]`, as `dmd-run -o FILE.npy` writes them
    #[arg(long, value_name = "FILE.npy", conflicts_with = "model")]
    pub images: Option<PathBuf>,
    /// Classes that the images of --images were asked for: `cycle` is k mod the number of classes
    #[arg(long, value_enum, default_value_t = AskedClasses::None, requires = "images")]
    pub classes: AskedClasses,
    /// Values of black and white in --images
    #[arg(long, value_name = "LOW,HIGH", default_value = "-1,1", allow_hyphen_values = true)]
    pub range: String,
    /// Real images: `fashion-mnist`, or a folder as `teacher --data` takes it, with a part for training and one for tests
    #[arg(long, value_name = "NAME|DIR", default_value = "fashion-mnist")]
    pub data: String,
    /// Images of every set
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub count: usize,
    /// DDIM steps of the teacher
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub steps: usize,
    /// Teacher of a generator, or `none` to leave it out [default: the run's, else the bundled base it was made from]
    #[arg(long, value_name = "DIR|NAME|none")]
    pub teacher: Option<String>,
    /// Also score the teacher's weights as a one-step generator, before any distillation
    #[arg(long)]
    pub undistilled: bool,
    /// Seed of the noise; trainings use 1 where nothing else is said
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u32,
    /// What is compared: the classifier inside this program, the folder of one that `dmd-distill classifier` made, or
    /// Inception-v3 with pytorch-fid's weights, which makes the distance an FID
    #[arg(long, value_name = "bundled|DIR|inception:FILE", default_value = "bundled")]
    pub features: String,
    /// Folder where a teacher's images are kept, to be computed once
    #[arg(long, value_name = "DIR", default_value = "eval")]
    pub cache: PathBuf,
    /// Only draw the share I (from 0) of N of the teacher's images, for N processes that fill the folder of --cache together;
    /// without this option the same command then scores them
    #[arg(long, value_name = "I/N", conflicts_with_all = ["images", "json"])]
    pub shard: Option<Share>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Where to compute
    #[arg(long, value_name = "auto|cpu|cuda[:N]", default_value = "auto")]
    pub device: String,
}

/// `--classes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AskedClasses {
    /// Not known.
    None,
    /// Image k was asked for class k mod the number of classes.
    Cycle,
}

/// What `--json` prints.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Model folder, preset, or file of images.
    pub model: String,
    /// Real images.
    pub data: String,
    /// Images of every set.
    pub count: usize,
    /// What the features are called.
    pub features: String,
    /// What the distance on these features is called.
    pub distance: &'static str,
    /// DDIM steps of the teacher.
    pub steps: usize,
    /// Classifier-free guidance of the teacher, that with which the generator was made; 1 is none.
    pub guidance: f64,
    /// Seed of the noise.
    pub seed: u32,
    /// SHA-256 of the generator's weights.
    pub student_sha256: Option<String>,
    /// SHA-256 of the teacher's weights.
    pub teacher_sha256: Option<String>,
    /// The generator, in one step.
    pub student: Option<Scores>,
    /// The teacher, in `steps` steps.
    pub teacher: Option<Scores>,
    /// The teacher's weights in one step.
    pub undistilled: Option<Scores>,
    /// Real test images: no generator is expected to come nearer. None if there are too few of them.
    pub floor: Option<Scores>,
}

/// `dmd-distill eval`.
pub fn run(args: &EvalArgs) -> Result<()> {
    let device = device::parse(&args.device)?;
    if let Some(share) = args.shard {
        return draw_share(args, share, &device);
    }
    let found = evaluate(args, &device)?;
    let text = match args.json {
        true => serde_json::to_string_pretty(&found).map_err(|e| Error::content(Path::new("stdout"), e))?,
        false => table::table(&found),
    };
    crate::commands::print(&text)
}

/// Draws a share of the teacher's images.
fn draw_share(args: &EvalArgs, share: Share, device: &Device) -> Result<()> {
    let subject = subject::find(args.model.as_deref().unwrap_or_default(), args.teacher.as_deref())?;
    subject.check_steps(args.steps)?;
    let Some(teacher) = &subject.teacher else {
        return Err(Error::Request("`--shard` draws the images of a teacher, and there is none".into()));
    };
    progress::handle_interrupts();
    let (count, folder) = draw::fill(&many_steps(args, teacher, subject.guidance()), share, device)?;
    let Share { index, of } = share;
    dmd_cli::say!("{count} images of share {index}/{of} in {}", folder.display());
    Ok(())
}

fn many_steps<'a>(args: &'a EvalArgs, teacher: &'a Checkpoint, guidance: f64) -> draw::ManySteps<'a> {
    let EvalArgs { steps, seed, count, cache, .. } = args;
    draw::ManySteps { teacher, guidance, steps: *steps, seed: *seed, count: *count, cache }
}

/// Scores everything that the arguments ask for.
pub fn evaluate(args: &EvalArgs, device: &Device) -> Result<Evaluation> {
    let subject = match (&args.model, &args.images) {
        (Some(model), None) => subject::find(model, args.teacher.as_deref())?,
        _ => subject::of_images(args.teacher.as_deref())?,
    };
    subject.check_steps(args.steps)?;
    let extractor = Extractor::find(&args.features, device)?;
    check_count(args.count, &extractor)?;
    if args.undistilled && (subject.student.is_none() || subject.teacher.is_none()) {
        let problem = "`--undistilled` needs a generator and its teacher";
        return Err(Error::Request(problem.into()));
    }
    if args.classes == AskedClasses::Cycle && extractor.classes().is_none() {
        return Err(Error::Request(format!("`--classes` needs a classifier, {} is none", extractor.name())));
    }
    let given = args.images.as_deref().map(|path| given(path, args, extractor.classes())).transpose()?;
    let shape = given.as_ref().map(|given| given.shape).or(subject.shape());
    let shape = shape.ok_or_else(|| Error::Request("nothing to score".into()))?;
    let [train, test] = [Split::Train, Split::Test].map(|split| Source::find(&args.data, split)?.load(shape));
    let (train, test) = (train?, test?);
    let names = train.classes.clone().unwrap_or_default();
    subject.check_classes(&args.data, &names, "`--data DIR` names other images")?;
    let hint = "`dmd-distill classifier` trains another for `--features DIR`";
    subject.check_classes(&extractor.name(), extractor.class_names(), hint)?;
    let (train, test) = (train.data, test.data);
    let reference = Pictures::balanced(&train, args.count)?;

    progress::handle_interrupts();
    dmd_cli::say!("{}, {} images of each set, on {}", extractor.name(), args.count, device::name(device));
    let scorer = Scorer::new(extractor, &reference)?;
    let score = |pictures: Result<Pictures>| scorer.scores(&pictures?);
    let student = match (&given, &subject.student) {
        (Some(given), _) => Some(scorer.scores(given)?),
        (None, Some(model)) => Some(score(draw::one_step(model, model, args.seed, args.count, device))?),
        (None, None) => None,
    };
    let undistilled = match (&subject.student, &subject.teacher) {
        (Some(model), Some(weights)) if args.undistilled => {
            Some(score(draw::one_step(model, weights, args.seed, args.count, device))?)
        }
        _ => None,
    };
    let teacher = subject
        .teacher
        .as_ref()
        .map(|teacher| score(draw::many_steps(&many_steps(args, teacher, subject.guidance()), device)));
    let floor = match test.len() >= args.count {
        true => Some(score(Pictures::balanced(&test, args.count))?),
        false => {
            dmd_cli::say!("warning: there are only {} test images, so no floor is known", test.len());
            None
        }
    };
    let sha256 = |checkpoint: &Checkpoint| checkpoint.sha256.clone();
    let model = args.images.as_ref().map(|path| path.display().to_string());
    Ok(Evaluation {
        model: model.or(args.model.clone()).unwrap_or_default(),
        data: args.data.clone(),
        count: args.count,
        features: scorer.name().to_owned(),
        distance: scorer.distance_name(),
        steps: args.steps,
        guidance: subject.guidance(),
        seed: args.seed,
        student_sha256: subject.student.as_ref().map(sha256),
        teacher_sha256: subject.teacher.as_ref().map(sha256),
        student,
        teacher: teacher.transpose()?,
        undistilled,
        floor,
    })
}

/// Covariances of fewer images than features say nothing; of not many more, little.
fn check_count(count: usize, extractor: &Extractor) -> Result<()> {
    let (name, features) = (extractor.name(), extractor.dimension());
    if count <= features {
        return Err(Error::Request(format!(
            "`--count {count}` is too small for the {features} features of {name}\n\nhint: take at least {}; published \
             figures use 10000 or 50000",
            ENOUGH * features
        )));
    }
    if count < ENOUGH * features {
        dmd_cli::say!(
            "warning: with {count} images and {features} features the Fréchet distance is mostly bias; look at `kid`, or \
             take at least {}",
            ENOUGH * features
        );
    }
    Ok(())
}

/// The first images of a file, with the classes that they were asked for.
fn given(path: &Path, args: &EvalArgs, classes: Option<usize>) -> Result<Pictures> {
    let range = args.range.split_once(',').and_then(|(a, b)| Some([a.parse().ok()?, b.parse::<f32>().ok()?]));
    let Some([low, high]) = range.filter(|[low, high]| low < high && (high - low).is_finite()) else {
        return Err(Error::Request(format!(
            "got `--range {}`, expected two numbers: lower,upper",
            args.range
        )));
    };
    let images = npy::read(path)?;
    let [n, c, h, w] = images.shape;
    if n < args.count {
        let problem = format!("it holds {n} images, expected {} from `--count`", args.count);
        return Err(Error::content(path, problem));
    }
    let asked = match (args.classes, classes) {
        (AskedClasses::Cycle, Some(classes)) => Some((0..args.count).map(|k| (k % classes) as u32).collect()),
        _ => None,
    };
    Ok(Pictures::quantised([c, h, w], &images.values[..args.count * c * h * w], [low, high], asked))
}
