//! What is judged: a generator and its teacher, found from what the user names.

use std::path::{Path, PathBuf};

use dmd_core::schedule::Schedule;

use crate::base;
use crate::checkpoint::{Checkpoint, Source};
use crate::error::{Error, Result};

/// A generator, a teacher, or both.
pub struct Subject {
    /// The one-step generator.
    pub student: Option<Checkpoint>,
    /// The base it was made from.
    pub teacher: Option<Checkpoint>,
}

impl Subject {
    /// Classifier-free guidance of the teacher while the generator was made; 1 is none.
    pub fn guidance(&self) -> f64 {
        let said =
            self.student.as_ref().and_then(|student| student.provenance.training.get("guidance")?.as_f64());
        said.unwrap_or(1.0)
    }
}

/// What the user names: a run folder, a generator folder or a base. `teacher` says where to find the teacher of a
/// generator, or `none`.
pub fn find(model: &str, teacher: Option<&str>) -> Result<Subject> {
    let folder = PathBuf::from(model);
    if model.ends_with(".onnx") {
        return Err(Error::Request(format!(
            "`{model}`: dmd-distill does not run ONNX files\n\nhint: draw its images, then score them:\n    dmd-run \
             {model} --count 10000 --seed 0 -o images.npy\n    dmd-distill eval --images images.npy --classes cycle"
        )));
    }
    if folder.join("generator").is_dir() {
        let student = load(&folder.join("generator"))?;
        return with_teacher(student, &folder, teacher);
    }
    if folder.join("generator.json").is_file() {
        let student = load(&folder)?;
        return with_teacher(student, folder.parent().unwrap_or(Path::new(".")), teacher);
    }
    let base = match folder.join("teacher").is_dir() {
        true => load(&folder.join("teacher"))?,
        false => base::load(model)?,
    };
    match teacher {
        None => Ok(Subject { student: None, teacher: Some(base) }),
        Some(_) => Err(Error::Request(format!(
            "`{model}` is a base, no generator: `--teacher` does not apply\n\nhint: without it, the base itself is scored"
        ))),
    }
}

/// The teacher to print beside images from a file, if one is named.
pub fn of_images(teacher: Option<&str>) -> Result<Subject> {
    Ok(Subject { student: None, teacher: named(teacher)? })
}

fn named(teacher: Option<&str>) -> Result<Option<Checkpoint>> {
    teacher.filter(|name| *name != "none").map(base::load).transpose()
}

fn load(folder: &Path) -> Result<Checkpoint> {
    Checkpoint::load(&Source::Folder(folder.to_owned()))
}

/// A generator with the teacher that is named, or lies beside it, or is a preset with the weights that its card names.
fn with_teacher(student: Checkpoint, run: &Path, teacher: Option<&str>) -> Result<Subject> {
    if student.generator.is_none() {
        return Err(Error::Request(format!(
            "`{}` is a base, not a one-step generator",
            student.provenance.name
        )));
    }
    let beside = run.join("teacher");
    let base = student.provenance.base.clone();
    let found = match (teacher, &base) {
        (Some(_), _) => named(teacher)?,
        (None, _) if beside.is_dir() => Some(load(&beside)?),
        (None, Some(base)) if base::find(&base.id).is_some() => {
            Some(base::load(&base.id)?).filter(|found| found.sha256 == base.sha256)
        }
        (None, _) => None,
    };
    let Some(found) = found else {
        return match teacher {
            Some(_) => Ok(Subject { student: Some(student), teacher: None }),
            None => Err(Error::Request(format!(
                "the teacher of `{}` is not here: its card names {}\n\nhint: say where it is with `--teacher DIR`, or leave \
                 it out with `--teacher none`",
                student.provenance.name,
                base.map_or("none".into(), |base| format!(
                    "`{}` with weights {}",
                    base.id,
                    base.sha256.get(..8).unwrap_or("unknown")
                ))
            ))),
        };
    };
    if found.config.image_shape() != student.config.image_shape() {
        return Err(Error::Request(format!(
            "the teacher's images have shape {:?}, expected {:?} as the generator's",
            found.config.image_shape(),
            student.config.image_shape()
        )));
    }
    if base.is_some_and(|base| !base.sha256.is_empty() && base.sha256 != found.sha256) {
        dmd_cli::say!("warning: the teacher's file is not the one that the generator's card names");
    }
    Ok(Subject { student: Some(student), teacher: Some(found) })
}

impl Subject {
    /// Whether the teacher can take so many steps.
    pub fn check_steps(&self, steps: usize) -> Result<()> {
        let total = self.teacher.as_ref().map(|t| Schedule::new(&t.schedule).num_train_timesteps());
        match total {
            Some(total) if !(1..=total).contains(&steps) => {
                Err(Error::Request(format!("got `--steps {steps}`, expected 1 to {total}")))
            }
            _ => Ok(()),
        }
    }

    /// Shape of the images that the models draw.
    pub fn shape(&self) -> Option<[usize; 3]> {
        self.models().next().map(|model| model.config.image_shape())
    }

    /// Whether `other`, which knows classes of these names, is about the classes that the models draw.
    pub fn check_classes(&self, other: &str, names: &[String], hint: &str) -> Result<()> {
        let own = self.models().find_map(|model| Some((model, &model.provenance.classes.as_ref()?.names)));
        match own {
            Some((model, own)) if !own.is_empty() && !names.is_empty() && own != names => {
                Err(Error::Request(format!(
                    "`{}` draws {} and others, {other} knows {} and others\n\nhint: {hint}",
                    model.provenance.name, own[0], names[0]
                )))
            }
            _ => Ok(()),
        }
    }

    fn models(&self) -> impl Iterator<Item = &Checkpoint> {
        self.student.iter().chain(&self.teacher)
    }
}
