//! What a distillation's samples of fixed seeds look like, and how near they are to real images. No training here.

use candle_core::{Device, Tensor};
use dmd_core::schedule::Schedule;

use crate::checkpoint::Checkpoint;
use crate::distillation::Distillation;
use crate::error::Result;
use crate::eval::{Pictures, Scorer};
use crate::monitor::Look;
use crate::network::{Guidance, Network, Tensors};
use crate::sampler::{Request, Sampling, one_step, sample};
use crate::train::DistillOptions;

/// Bits that make the seed of judged images another one than a run's.
const JUDGED_SEED: u32 = 0x4000_0000;
/// Real images that the metric compares with.
const REFERENCE: usize = 2000;
/// Images of a look without a metric, where there are no classes.
const FEW: usize = 16;
/// Steps of the teacher for its look.
const REFERENCE_STEPS: usize = 25;
/// Images drawn at once.
const BATCH: usize = 64;

/// Judges what the generator makes of fixed seeds.
pub struct Judge<'a> {
    options: &'a DistillOptions,
    scorer: Option<Scorer>,
    classes: Option<usize>,
    range: [f32; 2],
    device: Device,
}

impl<'a> Judge<'a> {
    /// With the metric of the base's data set, if this program has a classifier for it.
    pub fn new(options: &'a DistillOptions, base: &Checkpoint, device: &Device) -> Result<Self> {
        let scorer = match options.eval_count > 0 {
            true => Scorer::for_base(base, REFERENCE, device)?,
            false => None,
        };
        Ok(Self {
            options,
            scorer,
            classes: base.class_count(),
            range: base.config.range(),
            device: device.clone(),
        })
    }

    fn request(&self, count: usize) -> Request {
        Request::new(JUDGED_SEED ^ self.options.seed, 0, count, self.classes)
    }

    fn look_at(&self, x: &Tensor, n: usize) -> Result<Look> {
        Ok(Look::new(&x.flatten_all()?.to_vec1::<f32>()?, n, self.classes.unwrap_or(1), self.range))
    }

    /// The teacher's look, on a few images by a few steps.
    pub fn reference(&self, base: &Checkpoint) -> Result<Look> {
        let count = self.classes.map_or(FEW, |classes| 2 * classes);
        let schedule = Schedule::new(&base.schedule);
        let teacher = Network::frozen(&base.config, &base.tensors, &self.device)?;
        let steps = REFERENCE_STEPS.min(schedule.num_train_timesteps());
        let guidance = Guidance::new(self.options.guidance, base.provenance.classes.as_ref())?;
        let sampling = Sampling { guidance, ..Sampling::ddim(steps) };
        self.look_at(&sample(&teacher, &schedule, &self.request(count), &sampling)?, count)
    }

    /// The look of the averaged generator, and its metric.
    pub fn look(&self, work: &Distillation, average: &Tensors) -> Result<(Look, Option<f64>)> {
        let network = Network::frozen(&work.generator.config, average, &self.device)?;
        let few = self.classes.map_or(FEW, |classes| 2 * classes);
        let count = if self.scorer.is_some() { self.options.eval_count.max(few) } else { few };
        let (mut values, mut pictures) = (Vec::new(), None::<Pictures>);
        for first in (0..count).step_by(BATCH) {
            let all = self.request(count);
            let last = count.min(first + BATCH);
            let request = Request {
                images: all.images[first..last].to_vec(),
                classes: all.classes.map(|classes| classes[first..last].to_vec()),
                ..all
            };
            let x = one_step(&network, &work.one_step, &request)?.to_device(&Device::Cpu)?;
            values.extend(x.flatten_all()?.to_vec1::<f32>()?);
            let more = Pictures::from_tensor(&x, self.range, request.classes)?;
            match &mut pictures {
                Some(all) => all.append(more),
                None => pictures = Some(more),
            }
        }
        let look = Look::new(&values, count, self.classes.unwrap_or(1), self.range);
        let metric = match (&self.scorer, &pictures) {
            (Some(scorer), Some(pictures)) => Some(scorer.kid(pictures)?.mean),
            _ => None,
        };
        Ok((look, metric))
    }
}
