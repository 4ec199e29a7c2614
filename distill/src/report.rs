//! Pictures for people: the loss curves of a run, and noise, generator before and after, and teacher side by side.

use std::path::Path;
use std::sync::OnceLock;

use candle_core::Device;
use dmd_core::net::OneStep;
use dmd_core::pixels::{Image, grid};
use dmd_core::sampler::TEACHER_STEPS;
use dmd_core::schedule::Schedule;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};
use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::network::{Guidance, Network};
use crate::run::{Run, enlarge, images, save_image};
use crate::sampler::{Request, Sampling, one_step, sample};
use crate::train::DistillOptions;

/// Columns of a comparison.
const COLUMNS: usize = 10;
/// Height of a title in pixels.
const TITLE: usize = 34;

/// A curve of a plot: label, key of the statistics, colour, whether it is smoothed.
type Curve = (&'static str, &'static str, RGBColor, bool);

const BLUE: RGBColor = RGBColor(31, 119, 180);
const GREEN: RGBColor = RGBColor(44, 160, 44);
const RED: RGBColor = RGBColor(214, 39, 40);
const ORANGE: RGBColor = RGBColor(255, 127, 14);
const PURPLE: RGBColor = RGBColor(148, 103, 189);

/// Plots of a run: file, label of the vertical axis, curves.
const PLOTS: [(&str, &str, &[Curve]); 3] = [
    (
        "losses.png",
        "loss",
        &[
            ("distribution matching", "dm", BLUE, true),
            ("regression", "reg", GREEN, true),
            ("critic", "fake", RED, true),
            ("adversarial", "adversarial", ORANGE, true),
            ("discriminator", "discrimination", PURPLE, true),
        ],
    ),
    ("metric.png", "kernel distance", &[("kernel distance to real images", "kid", BLUE, false)]),
    (
        "look.png",
        "share of the image range",
        &[
            ("diversity", "diversity", BLUE, false),
            ("contrast", "contrast", GREEN, false),
            ("brightness", "brightness", ORANGE, false),
        ],
    ),
];

/// What the statistics of a run show over its updates, as PNG: losses, the metric, the look of samples. Returns the
/// files' names; plots without a value are left out, as are curves that are 0 throughout.
pub fn plot(run: &Run) -> Result<Vec<&'static str>> {
    fonts();
    let stats = run.stats()?;
    let mut written = Vec::new();
    for (name, y_label, curves) in PLOTS {
        let points = |curve: &Curve| curve_points(&stats, curve.1, curve.3);
        let curves: Vec<(Curve, Vec<(f64, f64)>)> = curves
            .iter()
            .map(|curve| (*curve, points(curve)))
            .filter(|(_, points)| points.iter().any(|(_, v)| *v != 0.0))
            .collect();
        if curves.is_empty() {
            continue;
        }
        let path = run.path(name);
        let (width, height) = (960u32, 420u32);
        let mut pixels = vec![255; (width * height * 3) as usize];
        draw(&mut pixels, (width, height), y_label, curves).map_err(|e| Error::content(&path, e))?;
        let image = Image { channels: 3, height: height as usize, width: width as usize, data: pixels };
        save_image(&path, &image)?;
        written.push(name);
    }
    Ok(written)
}

fn draw(
    pixels: &mut [u8],
    size: (u32, u32),
    y_label: &str,
    curves: Vec<(Curve, Vec<(f64, f64)>)>,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let all = || curves.iter().flat_map(|(_, points)| points);
    let last = all().map(|(step, _)| *step).fold(1.0, f64::max);
    let top = all().map(|(_, v)| *v).filter(|v| v.is_finite()).fold(1e-3, f64::max) * 1.05;
    let bottom = all().map(|(_, v)| *v).filter(|v| v.is_finite()).fold(0.0, f64::min);
    let root = BitMapBackend::with_buffer(pixels, size).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..last, bottom..top)?;
    chart.configure_mesh().x_desc("generator updates").y_desc(y_label).light_line_style(WHITE).draw()?;
    for ((label, _, colour, _), points) in curves {
        let points = points.into_iter().filter(|(_, v)| v.is_finite());
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
            .label(label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.9)).border_style(BLACK.mix(0.3)).draw()?;
    root.present()?;
    Ok(())
}

/// One figure over the steps; smoothed, its exponential moving average.
fn curve_points(stats: &[Value], key: &str, smoothed: bool) -> Vec<(f64, f64)> {
    let mut average: Option<f64> = None;
    stats
        .iter()
        .filter_map(|line| Some((line["step"].as_f64()?, line[key].as_f64()?)))
        .map(|(step, value)| {
            let next = average.filter(|_| smoothed).map_or(value, |a| 0.9 * a + 0.1 * value);
            average = Some(next);
            (step, next)
        })
        .collect()
}

/// One picture of four blocks with the same seeds and classes: the noise, the one-step generator before
/// distillation (the base's own weights), after it, and the teacher with up to 50 DDIM steps, guided as the run was.
pub fn comparison(
    path: &Path,
    base: &Checkpoint,
    generator: &Checkpoint,
    options: &DistillOptions,
    device: &Device,
) -> Result<()> {
    let (range, count) = (base.config.range(), options.samples);
    let columns = COLUMNS.min(count);
    let request = Request::new(options.seed, 0, count.min(2 * COLUMNS), base.class_count());
    let teacher = Network::frozen(&base.config, &base.tensors, device)?;
    let student = Network::frozen(&generator.config, &generator.tensors, device)?;
    let constants: OneStep = generator.one_step()?;
    let schedule = Schedule::new(&base.schedule);
    let steps = TEACHER_STEPS.min(schedule.num_train_timesteps());
    let guidance = Guidance::new(options.guidance, base.provenance.classes.as_ref())?;
    let sampling = Sampling { guidance, ..Sampling::ddim(steps) };
    let noise = request.noise(base.config.image_shape(), device)?;
    let [low, high] = range.map(f64::from);
    let (middle, spread) = ((low + high) / 2.0, (high - low) / 6.0);
    let shown = [
        ("noise".to_owned(), noise.affine(spread, middle)?),
        ("one step, before distillation".to_owned(), one_step(&teacher, &constants, &request)?),
        ("one step, distilled".to_owned(), one_step(&student, &constants, &request)?),
        (format!("teacher, {steps} steps"), sample(&teacher, &schedule, &request, &sampling)?),
    ];
    let mut blocks = Vec::new();
    for (title, x) in shown {
        let block = coloured(&enlarge(&grid(&images(&x, range)?, columns, 1), 3));
        blocks.push(titled(&title, block).map_err(|e| Error::content(path, e))?);
    }
    save_image(path, &grid(&blocks, 2, 8))
}

/// A grey image as RGB.
fn coloured(image: &Image) -> Image {
    match image.channels {
        1 => Image {
            channels: 3,
            height: image.height,
            width: image.width,
            data: image.data.iter().flat_map(|v| [*v; 3]).collect(),
        },
        _ => image.clone(),
    }
}

/// The image under a line of text.
fn titled(title: &str, image: Image) -> std::result::Result<Image, Box<dyn std::error::Error>> {
    fonts();
    let mut data = vec![255; image.width * TITLE * 3];
    {
        let root =
            BitMapBackend::with_buffer(&mut data, (image.width as u32, TITLE as u32)).into_drawing_area();
        let style = TextStyle::from(("sans-serif", 22).into_font()).color(&BLACK);
        root.draw_text(title, &style, (4, 6))?;
        root.present()?;
    }
    data.extend(image.data);
    Ok(Image { channels: 3, height: image.height + TITLE, width: image.width, data })
}

/// Makes the bundled font known to plotters, which otherwise would look for one on the machine.
fn fonts() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        for style in [FontStyle::Normal, FontStyle::Bold] {
            if register_font("sans-serif", style, epaint_default_fonts::UBUNTU_LIGHT).is_err() {
                dmd_cli::say!("warning: the bundled font cannot be read; pictures have no titles");
            }
        }
    });
}
