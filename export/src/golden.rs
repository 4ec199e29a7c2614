//! What a model must compute on a few images of the noise contract, by the exporter's own evaluation of the unfolded
//! network with the checkpoint's f32 weights. The bytes of a golden file; none is written here.

use std::collections::HashMap;
use std::panic::resume_unwind;
use std::thread::ScopedJoinHandle;

use dmd_core::card::{INPUT_CLASS, INPUT_T, INPUT_X_T, INPUT_Z, Kind, OUTPUT_X_GEN, output_of};
use dmd_core::golden::{GOLDEN_KEY, GOLDEN_VERSION, GoldenInfo};
use dmd_core::noise;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use sha2::{Digest, Sha256};

use crate::{Array, Checkpoint, Error, Exported, Result, evaluate};

/// Seed of the images.
pub const SEED: u32 = 0;
/// Images in a file.
pub const COUNT: usize = 8;

/// Inputs and output of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Reference {
    /// Noise of images `0..` of [`SEED`], `[n, c, h, w]`.
    pub x: Array,
    /// Steps of a teacher, from the last to the first, `[n]`.
    pub t: Option<Array>,
    /// Image `k` has class `k mod count`, as everywhere.
    pub class: Option<Vec<usize>>,
    /// `[n, c, h, w]`.
    pub output: Array,
}

/// Evaluates the first `count` images, on all cores.
pub fn reference(checkpoint: &Checkpoint, kind: Kind, count: usize) -> Result<Reference> {
    let shape = checkpoint.config.image_shape();
    let shape_of = |n: usize| [&[n], &shape[..]].concat();
    let mut x = Array::filled(&shape_of(count), 0.0);
    let len = x.data.len() / count;
    for (k, x) in (0..).zip(x.data.chunks_mut(len)) {
        noise::standard_normal(SEED, k, x);
    }
    let classes = checkpoint.provenance.classes.as_ref();
    let class = classes.map(|classes| (0..count as u64).map(|k| classes.of_image(k)).collect::<Vec<_>>());
    let last = checkpoint.schedule.num_train_timesteps - 1;
    let step = |k: usize| ((count - 1 - k) * last / (count - 1).max(1)) as f32;
    let t =
        (kind == Kind::Teacher).then(|| Array { shape: vec![count], data: (0..count).map(step).collect() });

    let image = |k: usize| -> Result<Array> {
        let x = Array::new(&shape_of(1), x.row(k).to_vec())?;
        let class = class.as_ref().map(|class| &class[k..=k]);
        match &t {
            Some(t) => evaluate::eps_pred(checkpoint, &x, t.row(k), class),
            None => evaluate::x_gen(checkpoint, &x, class),
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut data = Vec::with_capacity(x.data.len());
    for start in (0..count).step_by(threads) {
        let arrays: Vec<Result<Array>> = std::thread::scope(|scope| {
            let image = &image;
            let images = start..(start + threads).min(count);
            let started: Vec<_> = images.map(|k| scope.spawn(move || image(k))).collect();
            let finish = |thread: ScopedJoinHandle<_>| thread.join().unwrap_or_else(|p| resume_unwind(p));
            started.into_iter().map(finish).collect()
        });
        for array in arrays {
            data.extend(array?.data);
        }
    }
    let output = Array::new(&x.shape, data)?;
    Ok(Reference { x, t, class, output })
}

/// The golden file of an exported checkpoint.
///
/// # Errors
/// If the checkpoint cannot be evaluated.
pub fn file(checkpoint: &Checkpoint, exported: &Exported) -> Result<Vec<u8>> {
    let kind = exported.card.kind;
    let Reference { x, t, class, output } = reference(checkpoint, kind, COUNT)?;
    let mut hash = Sha256::new();
    hash.update(&exported.bytes);
    hash.update(exported.data.as_deref().unwrap_or_default());
    let sha256 = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    let info = GoldenInfo {
        golden_version: GOLDEN_VERSION,
        name: exported.card.provenance.name.clone(),
        kind,
        sha256,
        seed: SEED,
        count: COUNT,
        noise: noise::CONTRACT.into(),
        created_by: exported.card.created_by.clone(),
    };
    let floats = |array: &Array| -> Vec<u8> { array.data.iter().flat_map(|v| v.to_le_bytes()).collect() };
    let (image, result) = match kind {
        Kind::Generator => (INPUT_Z, OUTPUT_X_GEN),
        Kind::Teacher => (INPUT_X_T, output_of(checkpoint.schedule.prediction_type)),
    };
    let mut tensors = vec![
        (image, Dtype::F32, x.shape.clone(), floats(&x)),
        (result, Dtype::F32, output.shape.clone(), floats(&output)),
    ];
    tensors.extend(t.map(|t| (INPUT_T, Dtype::F32, t.shape.clone(), floats(&t))));
    tensors.extend(class.map(|class| {
        let bytes = class.iter().flat_map(|&c| (c as i64).to_le_bytes()).collect();
        (INPUT_CLASS, Dtype::I64, vec![class.len()], bytes)
    }));
    let problem = |e: &dyn std::fmt::Display| Error::Verify(format!("golden file: {e}"));
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        Ok((*name, TensorView::new(*dtype, shape.clone(), bytes).map_err(|e| problem(&e))?))
    });
    let views = views.collect::<Result<Vec<_>>>()?;
    let info = serde_json::to_string(&info).map_err(|e| problem(&e))?;
    safetensors::serialize(views, Some(HashMap::from([(GOLDEN_KEY.to_owned(), info)])))
        .map_err(|e| problem(&e))
}
