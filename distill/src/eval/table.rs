//! The result for people.

use super::{Evaluation, Scores};

/// Width of a figure.
const WIDTH: usize = 11;

/// Rows for everything that was scored.
pub fn table(found: &Evaluation) -> String {
    let mut lines = vec![
        format!("{} on {}", found.distance, found.features),
        format!(
            "{} images of each set against the training images of {}, seed {}",
            found.count, found.data, found.seed
        ),
        String::new(),
    ];
    let rows = [
        (
            format!("{}, one step", if found.student_sha256.is_some() { "student" } else { "images" }),
            &found.student,
        ),
        (format!("teacher, {} steps", found.steps), &found.teacher),
        ("undistilled, one step".to_owned(), &found.undistilled),
        ("floor: test images".to_owned(), &found.floor),
    ];
    let rows: Vec<(String, [String; 9])> =
        rows.into_iter().filter_map(|(name, scores)| Some((name, cells(scores.as_ref()?)))).collect();
    let heads = [
        found.distance,
        "KID·1000",
        "± 1000",
        "precision",
        "recall",
        "density",
        "coverage",
        "agreement",
        "class TV",
    ];
    let left = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let line = |name: &str, cells: &[String]| {
        let cells: String = cells.iter().map(|cell| format!("{cell:>WIDTH$}")).collect();
        format!("{name:left$}{cells}")
    };
    lines.push(line("", &heads.map(str::to_owned)));
    lines.extend(rows.iter().map(|(name, cells)| line(name, cells)));
    if let (Some(student), Some(teacher)) = (&found.student, &found.teacher) {
        lines.push(String::new());
        lines.push(format!("student / teacher: {:.2}", student.frechet / teacher.frechet));
    }
    lines.join("\n")
}

fn cells(scores: &Scores) -> [String; 9] {
    let share = |value: f64| format!("{value:.3}");
    let optional = |value: Option<f64>| value.map_or("-".to_owned(), share);
    [
        format!("{:.3}", scores.frechet),
        format!("{:.3}", 1000.0 * scores.kid),
        format!("{:.3}", 1000.0 * scores.kid_std),
        share(scores.precision),
        share(scores.recall),
        share(scores.density),
        share(scores.coverage),
        optional(scores.class_agreement),
        optional(scores.class_tv),
    ]
}
