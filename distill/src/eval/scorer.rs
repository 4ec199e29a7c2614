//! Scores of a set of images against a reference set, on one kind of features.

use std::path::Path;

use candle_core::Device;
use serde::Serialize;

use super::Pictures;
use super::inception::{self, Inception};
use crate::checkpoint::{self, Checkpoint};
use crate::classifier::{Classifier, RANGE};
use crate::data::{NAMES, Source, Split};
use crate::error::{Error, Result};
use crate::metrics::Features;
use crate::metrics::classes::{Predictions, total_variation};
use crate::metrics::frechet::Gaussian;
use crate::metrics::kid::{Kid, kid};
use crate::metrics::neighbours::neighbours;
use crate::progress::{Progress, stop_requested};

/// Images whose features are computed at once.
const BATCH: usize = 128;
/// The same for a large network.
const FEW: usize = 16;
/// Work of which the progress is worth showing.
const MANY: usize = 2000;

/// Turns images into features.
pub enum Extractor {
    /// The penultimate layer of a small classifier.
    Classifier(Box<Classifier>),
    /// Inception-v3 in the weights of the FID, which the user brings.
    Inception(Box<Inception>),
}

/// What an extractor makes of a set of images.
struct Extracted {
    features: Features,
    predictions: Option<Predictions>,
}

/// One row of the result.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Scores {
    /// Fréchet distance to the reference.
    pub frechet: f64,
    /// Kernel distance to the reference.
    pub kid: f64,
    /// Its standard deviation over subsets.
    pub kid_std: f64,
    /// Share of images within the reference's neighbourhoods.
    pub precision: f64,
    /// Share of the reference within the images' neighbourhoods.
    pub recall: f64,
    /// Mean number of the reference's neighbourhoods an image is in, over k.
    pub density: f64,
    /// Share of the reference's neighbourhoods that hold an image.
    pub coverage: f64,
    /// Share of images in which the classifier sees the class that was asked for.
    pub class_agreement: Option<f64>,
    /// Total variation between the predicted classes of the images and of the reference.
    pub class_tv: Option<f64>,
    /// The classifier's mean entropy, in nats.
    pub entropy: Option<f64>,
}

/// Judges images against a reference.
pub struct Scorer {
    extractor: Extractor,
    name: String,
    shape: [usize; 3],
    reference: Extracted,
    gaussian: Gaussian,
}

impl Extractor {
    /// What `--features` names.
    pub fn find(name: &str, device: &Device) -> Result<Self> {
        if let Some(file) = name.strip_prefix("inception:") {
            let network = Inception::load(Path::new(file), device)?;
            if !network.is_published() {
                dmd_cli::say!(
                    "warning: these are not the weights that the name FID stands for, so the result is not called that"
                );
            }
            return Ok(Self::Inception(Box::new(network)));
        }
        let folder = Path::new(name);
        match name {
            "bundled" => Ok(Self::Classifier(Box::new(Classifier::bundled(device)?))),
            _ if folder.is_dir() => Ok(Self::Classifier(Box::new(Classifier::load(
                &checkpoint::Source::Folder(folder.to_owned()),
                device,
            )?))),
            _ => Err(Error::Request(format!(
                "no features `{name}`: expected `bundled`, `inception:FILE`, or a folder that `dmd-distill classifier` wrote"
            ))),
        }
    }

    /// Network, number of features, and the first digits of the weights' SHA-256.
    pub fn name(&self) -> String {
        match self {
            Self::Classifier(classifier) => classifier.name(),
            Self::Inception(network) => network.name(),
        }
    }

    /// What the Fréchet distance on these features is called.
    pub fn distance_name(&self) -> &'static str {
        match self {
            Self::Inception(network) if network.is_published() => "FID",
            _ => "Fréchet",
        }
    }

    /// Number of features.
    pub fn dimension(&self) -> usize {
        match self {
            Self::Classifier(classifier) => classifier.config.features,
            Self::Inception(_) => inception::FEATURES,
        }
    }

    /// Number of classes that it predicts, if it does.
    pub fn classes(&self) -> Option<usize> {
        match self {
            Self::Classifier(classifier) => Some(classifier.config.num_classes),
            Self::Inception(_) => None,
        }
    }

    /// Names of these classes.
    pub fn class_names(&self) -> &[String] {
        match self {
            Self::Classifier(classifier) => &classifier.card.classes,
            Self::Inception(_) => &[],
        }
    }

    fn check_shape(&self, shape: [usize; 3]) -> Result<()> {
        let Self::Classifier(classifier) = self else { return Ok(()) };
        let expected = classifier.config.image_shape();
        match shape == expected {
            true => Ok(()),
            false => Err(Error::Request(format!(
                "images have shape {shape:?}, expected {expected:?} from the features {}\n\nhint: `dmd-distill classifier \
                 --data DIR --shape {}` trains others, and `--features inception:FILE` takes images of any size",
                self.name(),
                shape.map(|n| n.to_string()).join("x")
            ))),
        }
    }

    /// Features and predictions; where a stop has been requested and `stops`, an error.
    fn extract(&self, pictures: &Pictures, stops: bool) -> Result<Extracted> {
        self.check_shape(pictures.shape)?;
        let (count, batch) = (pictures.len(), if self.classes().is_some() { BATCH } else { FEW });
        let (mut features, mut logits) = (Vec::new(), Vec::new());
        let mut progress = (count >= MANY).then(|| Progress::new("features", 0, count as u64));
        for first in (0..count).step_by(batch) {
            let size = batch.min(count - first);
            match self {
                Self::Classifier(classifier) => {
                    let x = pictures.batch(first, size, RANGE, &Device::Cpu)?;
                    let (found, classes) = classifier.classify(&x)?;
                    features.extend(found.flatten_all()?.to_vec1::<f32>()?);
                    logits.extend(classes.flatten_all()?.to_vec1::<f32>()?);
                }
                Self::Inception(network) => {
                    let x = pictures.batch(first, size, [0.0, 1.0], &Device::Cpu)?;
                    features.extend(network.features(&x)?.flatten_all()?.to_vec1::<f32>()?);
                }
            }
            if let Some(progress) = &mut progress {
                progress.update((first + size) as u64, "");
            }
            if stops && stop_requested() {
                return Err(Error::Interrupted("stopped while computing features".into()));
            }
        }
        let predictions = self.classes().map(|classes| Predictions::new(classes, &logits)).transpose()?;
        Ok(Extracted { features: Features::new(self.dimension(), &features)?, predictions })
    }
}

impl Scorer {
    /// The bundled features against `count` training images, if they are made for the images of this base: the same size
    /// and classes. A data set that cannot be had leads to a warning and no scorer.
    pub fn for_base(base: &Checkpoint, count: usize, device: &Device) -> Result<Option<Self>> {
        let classifier = Classifier::bundled(device)?;
        let names = base.provenance.classes.as_ref().map(|classes| &classes.names);
        if classifier.config.image_shape() != base.config.image_shape()
            || names != Some(&classifier.card.classes)
        {
            return Ok(None);
        }
        match Source::find(NAMES[0], Split::Train).and_then(|source| source.load(base.config.image_shape())) {
            Ok(loaded) => {
                let reference = Pictures::balanced(&loaded.data, count)?;
                Ok(Some(Self::new(Extractor::Classifier(Box::new(classifier)), &reference)?))
            }
            Err(e) => {
                dmd_cli::say!("warning: no metric during this run: {e}");
                Ok(None)
            }
        }
    }

    /// Computes the features of the reference once.
    pub fn new(extractor: Extractor, reference: &Pictures) -> Result<Self> {
        let name = extractor.name();
        let found = extractor.extract(reference, true)?;
        let gaussian = Gaussian::of(&found.features)?;
        Ok(Self { extractor, name, shape: reference.shape, reference: found, gaussian })
    }

    /// What the features are called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the Fréchet distance on these features is called.
    pub fn distance_name(&self) -> &'static str {
        self.extractor.distance_name()
    }

    /// The kernel distance alone: meant for few images, again and again during a training, which is not stopped here.
    pub fn kid(&self, pictures: &Pictures) -> Result<Kid> {
        kid(&self.reference.features, &self.extract(pictures, false)?.features)
    }

    /// Everything.
    pub fn scores(&self, pictures: &Pictures) -> Result<Scores> {
        let found = self.extract(pictures, true)?;
        let Kid { mean, std } = kid(&self.reference.features, &found.features)?;
        let near = neighbours(&self.reference.features, &found.features)?;
        let agreement =
            |predictions: &Predictions| pictures.classes.as_ref().map(|asked| predictions.agreement(asked));
        let variation = self.reference.predictions.as_ref().zip(found.predictions.as_ref());
        Ok(Scores {
            frechet: self.gaussian.distance(&Gaussian::of(&found.features)?)?,
            kid: mean,
            kid_std: std,
            precision: near.precision,
            recall: near.recall,
            density: near.density,
            coverage: near.coverage,
            class_agreement: found.predictions.as_ref().and_then(agreement),
            class_tv: variation.map(|(a, b)| total_variation(&a.histogram, &b.histogram)),
            entropy: found.predictions.as_ref().map(|predictions| predictions.entropy),
        })
    }

    fn extract(&self, pictures: &Pictures, stops: bool) -> Result<Extracted> {
        if pictures.shape != self.shape {
            return Err(Error::Request(format!(
                "images have shape {:?}, expected {:?} as the reference",
                pictures.shape, self.shape
            )));
        }
        self.extractor.extract(pictures, stops)
    }
}
