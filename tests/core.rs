//! core against the golden data: schedules, samplers, time embedding, noise, the fixtures' descriptions, and the
//! golden data against their own README. Must not need another crate of the workspace.

use anyhow::{Context, Result, ensure};
use dmd_core::card::GeneratorConfig;
use dmd_core::compare::Tolerance;
use dmd_core::config::ModelConfig;
use dmd_core::net::shapes::summarise;
use dmd_core::net::{OneStep, TimestepEmbedding};
use dmd_core::noise::standard_normal;
use dmd_core::sampler::{Sampler, Trajectory};
use dmd_core::schedule::{Schedule, ScheduleConfig, Variance};
use dmd_tests::{Golden, compare, fixture, read_text, repository};
use sha2::{Digest, Sha256};

const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

fn fixture_schedule(name: &str) -> Result<Schedule> {
    let text = read_text(&fixture(name).join("scheduler_config.json"))?;
    Ok(Schedule::new(&serde_json::from_str::<ScheduleConfig>(&text)?))
}

fn close_f64(what: &str, got: &[f64], expected: &[f64], relative: f64) -> Result<()> {
    ensure!(got.len() == expected.len(), "`{what}`: got {} values, expected {}", got.len(), expected.len());
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        ensure!((g - e).abs() <= relative * e.abs(), "`{what}` at {i}: got {g:e}, expected {e:e}");
    }
    Ok(())
}

/// Golden: `scripts/golden_schedule.py`. `betas` of the cosine schedule come from a difference of numbers near 1.
#[test]
fn schedules_match_diffusers() -> Result<()> {
    let golden = Golden::load("schedule")?;
    let cases = golden.cases()?.as_object().context("`cases` is no object")?;
    assert_eq!(cases.len(), 5);
    for (name, config) in cases {
        let schedule = Schedule::new(&serde_json::from_value::<ScheduleConfig>(config.clone())?);
        let betas = golden.f64(&format!("{name}.betas.f64"))?;
        let kept = golden.f64(&format!("{name}.alphas_cumprod.f64"))?;
        let of_betas = if name.starts_with("squaredcos") { 1e-10 } else { 1e-12 };
        close_f64(&format!("{name}.betas"), &schedule.betas, &betas, of_betas)?;
        close_f64(&format!("{name}.alphas_cumprod"), &schedule.alphas_cumprod, &kept, 1e-12)?;
    }
    Ok(())
}

/// Golden: `scripts/golden_schedule.py`. The network's outputs are given, so that only the sampler is tested: ten steps in
/// a row, and the image before each of them.
#[test]
fn samplers_follow_diffusers() -> Result<()> {
    let golden = Golden::load("schedule")?;
    for (prefix, sampler, text) in [
        ("ddim", Sampler::Ddim, r#"{"clip_sample":false}"#),
        ("ddim_clip", Sampler::Ddim, "{}"),
        ("ddpm_small", Sampler::Ddpm, r#"{"variance_type":"fixed_small"}"#),
        ("ddpm_large", Sampler::Ddpm, r#"{"variance_type":"fixed_large","clip_sample":false}"#),
        ("ddim_v", Sampler::Ddim, r#"{"prediction_type":"v_prediction"}"#),
        ("ddim_sample", Sampler::Ddim, r#"{"prediction_type":"sample","clip_sample_range":1.5}"#),
        ("ddpm_v", Sampler::Ddpm, r#"{"prediction_type":"v_prediction"}"#),
    ] {
        let schedule = Schedule::new(&serde_json::from_str::<ScheduleConfig>(text)?);
        let path = Trajectory::new(&schedule, sampler, 10, [-1.0, 1.0])?;
        let timesteps: Vec<i64> = path.timesteps().map(|t| t as i64).collect();
        assert_eq!(timesteps, golden.i64(&format!("{prefix}.timesteps"))?);
        let (images, outputs) =
            (golden.f32(&format!("{prefix}.x"))?, golden.f32(&format!("{prefix}.output"))?);
        let size = outputs.len() / path.evaluations();
        let noise = if sampler == Sampler::Ddpm { golden.f32(&format!("{prefix}.noise"))? } else { vec![] };
        let mut x = images[..size].to_vec();
        let mut step = 0;
        let predict = |_: usize, x: &[f32]| {
            compare(
                &format!("{prefix} before step {step}"),
                x,
                &images[step * size..][..size],
                Tolerance::LAYER,
            )?;
            step += 1;
            Ok::<_, anyhow::Error>(outputs[(step - 1) * size..][..size].to_vec())
        };
        path.run(&mut x, predict, |i, out| out.copy_from_slice(&noise[i * size..][..size]))?;
        // diffusers adds noise to the finished image too if its last step is not 0 and the variance large.
        let left = match schedule.variance {
            Variance::Large if sampler == Sampler::Ddpm => schedule.sigma_t(timesteps[9] as usize),
            _ => 0.0,
        };
        let last = images[10 * size..].iter().zip(noise.iter().skip(9 * size).chain(std::iter::repeat(&0.0)));
        let image: Vec<f32> = last.map(|(x, noise)| x - left as f32 * noise).collect();
        compare(&format!("{prefix}, the image"), &x, &image, Tolerance::LAYER)?;
    }
    Ok(())
}

/// Golden: `scripts/golden_unet.py`.
#[test]
fn one_step_has_the_constants_of_its_step() -> Result<()> {
    let golden = Golden::load("one_step")?;
    let config: GeneratorConfig = serde_json::from_value(golden.cases()?.clone())?;
    let one_step = OneStep::new(&config, &fixture_schedule("tiny-class")?)?;
    close_f64("alpha_t", &[one_step.alpha_t], &golden.f64("alpha_t.f64")?, 1e-12)?;
    close_f64("sigma_t", &[one_step.sigma_t], &golden.f64("sigma_t.f64")?, 1e-12)?;
    let x_gen: Vec<f32> = golden
        .f32("z")?
        .iter()
        .zip(golden.f32("eps_pred")?)
        .map(|(z, eps)| ((f64::from(*z) - one_step.sigma_t * f64::from(eps)) / one_step.alpha_t) as f32)
        .collect();
    compare("x_gen", &x_gen, &golden.f32("x_gen")?, Tolerance::LAYER)
}

/// Golden: `scripts/golden_ops.py`. diffusers multiplies step and frequency in f32: at t = 999 half a unit in the last
/// place of the frequency is an angle of 6e-5.
#[test]
fn time_embedding_matches_diffusers() -> Result<()> {
    let golden = Golden::load("ops")?;
    let cases = golden.cases()?.as_object().context("`cases` is no object")?;
    let mut seen = 0;
    for (name, case) in cases.iter().filter(|(_, case)| case["op"] == "timestep_embedding") {
        seen += 1;
        let spec = TimestepEmbedding {
            features: serde_json::from_value(case["features"].clone())?,
            flip_sin_to_cos: serde_json::from_value(case["flip"].clone())?,
            freq_shift: serde_json::from_value(case["freq_shift"].clone())?,
        };
        let mut got = vec![];
        for t in golden.f32(&format!("{name}.t"))? {
            let angles = || spec.frequencies().into_iter().map(move |f| f * f64::from(t));
            let sines = angles().map(|a| a.sin() as f32);
            let cosines = angles().map(|a| a.cos() as f32);
            if spec.flip_sin_to_cos {
                got.extend(cosines.chain(sines));
            } else {
                got.extend(sines.chain(cosines));
            }
        }
        let tolerance = Tolerance { abs: 1.2e-4, rel: 0.0 };
        compare(name, &got, &golden.f32(&format!("{name}.y"))?, tolerance)?;
    }
    assert_eq!(seen, 3);
    Ok(())
}

/// Golden: `scripts/golden_noise.py`, an implementation in plain Python.
#[test]
fn noise_matches_the_reference_to_the_bit() -> Result<()> {
    let golden = Golden::load("noise")?;
    let cases = golden.cases()?.as_object().context("`cases` is no object")?;
    assert_eq!(cases.len(), 10);
    for (name, case) in cases {
        let expected = golden.f32(name)?;
        let mut got = vec![0.0; expected.len()];
        let seed = serde_json::from_value(case["seed"].clone())?;
        standard_normal(seed, serde_json::from_value(case["image"].clone())?, &mut got);
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
        assert_eq!(bits(&got), bits(&expected), "{name}");
    }
    Ok(())
}

#[test]
fn the_noise_page_shows_the_reference_and_true_vectors() -> Result<()> {
    let page = read_text(&repository().join("docs/noise.md"))?;
    let code = between(&page, "```python\n", "```")?;
    let script = read_text(&repository().join("scripts/golden_noise.py"))?;
    assert_eq!(code, between(&script, "# reference begin\n", "# reference end")?);

    let table = between(&page, "<!-- vectors begin -->", "<!-- vectors end -->")?;
    let rows: Vec<Vec<&str>> = table.lines().skip(3).map(cells).collect();
    assert_eq!(rows.len(), 10);
    for row in rows {
        let [seed, image, decimals, bits] = row[..] else { anyhow::bail!("got {row:?}, expected 4 cells") };
        let bits = bits.split(' ').map(|b| Ok(u32::from_str_radix(b, 16)?)).collect::<Result<Vec<u32>>>()?;
        let mut got = vec![0.0; bits.len()];
        standard_normal(seed.parse()?, image.parse()?, &mut got);
        assert_eq!(got.iter().map(|v| v.to_bits()).collect::<Vec<u32>>(), bits, "seed {seed}, image {image}");
        let decimals = decimals.split(' ').map(|d| Ok(d.parse()?)).collect::<Result<Vec<f32>>>()?;
        assert_eq!(decimals, got, "seed {seed}, image {image}");
    }
    Ok(())
}

/// Fixtures: `scripts/golden_unet.py`.
#[test]
fn core_understands_the_files_that_diffusers_writes() -> Result<()> {
    for (name, shape, classes, parameters) in
        [("tiny-ddpm", [3, 16, 16], None, 64_483), ("tiny-class", [1, 12, 12], Some(11), 52_337)]
    {
        let config = ModelConfig::from_json(&read_text(&fixture(name).join("config.json"))?)?;
        assert_eq!((config.image_shape(), config.class_rows()), (shape, classes), "{name}");
        let summary = summarise(&config)?;
        assert_eq!(summary.parameter_count(), parameters, "{name}");
        let weights = Golden::read(&fixture(name).join(WEIGHTS))?;
        let tensors =
            weights.names().map(|key| Ok((key, weights.shape(key)?))).collect::<Result<Vec<_>>>()?;
        summary.check(tensors).with_context(|| format!("`{name}`"))?;
        assert_eq!(fixture_schedule(name)?.num_train_timesteps(), 1000);
    }
    Ok(())
}

/// `config.json` of google/ddpm-celebahq-256, which ddpm-church-256 and ddpm-bedroom-256 share but for their history.
const CELEBAHQ: &str = r#"{"_class_name":"UNet2DModel","_diffusers_version":"0.0.4","act_fn":"silu",
    "attention_head_dim":null,"block_out_channels":[128,128,256,256,512,512],"center_input_sample":false,
    "down_block_types":["DownBlock2D","DownBlock2D","DownBlock2D","DownBlock2D","AttnDownBlock2D","DownBlock2D"],
    "downsample_padding":0,"flip_sin_to_cos":false,"freq_shift":1,"in_channels":3,"layers_per_block":2,
    "mid_block_scale_factor":1,"norm_eps":1e-06,"norm_num_groups":32,"out_channels":3,"sample_size":256,
    "time_embedding_type":"positional",
    "up_block_types":["UpBlock2D","AttnUpBlock2D","UpBlock2D","UpBlock2D","UpBlock2D","UpBlock2D"]}"#;

/// What diffusers' example of unconditional training writes (0.42, `--resolution 64`).
const EXAMPLE: &str = r#"{"_class_name":"UNet2DModel","_diffusers_version":"0.42.1","act_fn":"silu",
    "add_attention":true,"attention_head_dim":8,"attn_norm_num_groups":null,"block_out_channels":[128,128,256,256,512,512],
    "center_input_sample":false,"class_embed_type":null,
    "down_block_types":["DownBlock2D","DownBlock2D","DownBlock2D","DownBlock2D","AttnDownBlock2D","DownBlock2D"],
    "downsample_padding":1,"downsample_type":"conv","dropout":0.0,"flip_sin_to_cos":true,"freq_shift":0,"in_channels":3,
    "layers_per_block":2,"mid_block_scale_factor":1,"mid_block_type":"UNetMidBlock2D","norm_eps":1e-05,
    "norm_num_groups":32,"num_class_embeds":null,"num_train_timesteps":null,"out_channels":3,
    "resnet_time_scale_shift":"default","sample_size":64,"time_embedding_dim":null,"time_embedding_type":"positional",
    "up_block_types":["UpBlock2D","AttnUpBlock2D","UpBlock2D","UpBlock2D","UpBlock2D","UpBlock2D"],
    "upsample_type":"conv"}"#;

/// Counts: `UNet2DModel(...).num_parameters()` and `len(state_dict())` by diffusers 0.42.1.
#[test]
fn configurations_of_published_models_are_read() -> Result<()> {
    let larger = EXAMPLE.replace("\"sample_size\":64", "\"sample_size\":128");
    for (text, side, heads, eps) in
        [(CELEBAHQ, 256, 1, 1e-6), (EXAMPLE, 64, 64, 1e-5), (larger.as_str(), 128, 64, 1e-5)]
    {
        let config = ModelConfig::from_json(text)?;
        let summary = summarise(&config)?;
        assert_eq!((summary.parameter_count(), summary.parameters.len()), (113_673_219, 450));
        let ModelConfig::UNet2D(unet) = &config else { anyhow::bail!("{config:?}") };
        assert_eq!((config.image_shape(), unet.heads(512), unet.norm_eps), ([3, side, side], heads, eps));
        assert_eq!(ModelConfig::from_json(&serde_json::to_string(&config)?)?, config);
    }
    Ok(())
}

#[test]
fn the_golden_readme_lists_every_file_with_its_hash() -> Result<()> {
    let root = repository();
    let page = read_text(&root.join("tests/golden/README.md"))?;
    let mut listed = vec![];
    for row in page.lines().filter(|line| line.starts_with("| `")).map(cells) {
        let [path, script, _, expected] = row[..] else { anyhow::bail!("got {row:?}, expected 4 cells") };
        let (path, script) = (path.trim_matches('`'), script.trim_matches('`'));
        let bytes = std::fs::read(root.join(path)).with_context(|| format!("cannot read `{path}`"))?;
        let got: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(got, expected.trim_matches('`'), "{path}");
        ensure!(root.join("scripts").join(script).is_file(), "`{path}` names `{script}`, which is missing");
        listed.push(root.join(path));
    }
    let fixtures = ["cifar-10-batches-py", "cifar-10-batches-py/code", "pickles", "tiny-class", "tiny-ddpm"]
        .map(fixture);
    for folder in fixtures.into_iter().chain([root.join("tests/golden")]) {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            ensure!(
                listed.contains(&path) || path.is_dir() || path.ends_with("README.md"),
                "`{}` is not listed in tests/golden/README.md",
                path.display()
            );
        }
    }
    Ok(())
}

fn between<'a>(text: &'a str, start: &str, end: &str) -> Result<&'a str> {
    let (_, rest) = text.split_once(start).with_context(|| format!("`{start}` is missing"))?;
    let (inside, _) = rest.split_once(end).with_context(|| format!("`{end}` is missing"))?;
    Ok(inside.trim_end())
}

fn cells(row: &str) -> Vec<&str> {
    row.trim_matches('|').split('|').map(str::trim).collect()
}
