//! A base's description: `config.json`, `scheduler_config.json` and `generator.json`, one line each.
#![no_main]

use dmd_core::card::GeneratorConfig;
use dmd_core::config::ModelConfig;
use dmd_core::net::{OneStep, shapes};
use dmd_core::sampler::{Sampler, Trajectory};
use dmd_core::schedule::{Schedule, ScheduleConfig};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    dmd_fuzz::within(text.len(), 256, || {
        let mut lines = text.lines();
        let mut next = || lines.next().unwrap_or_default();
        let config = ModelConfig::from_json(next());
        if let Ok(config) = &config {
            if let Ok(summary) = shapes::summarise(config) {
                assert!(summary.parameter_count() > 0);
            }
            let again = ModelConfig::from_json(&serde_json::to_string(config).expect("JSON"));
            assert_eq!(again.as_ref().ok(), Some(config));
        }
        let Ok(schedule) = serde_json::from_str::<ScheduleConfig>(next()) else { return };
        if let Ok(config) = &config {
            let _ = schedule.check_network(config);
        }
        let generator = serde_json::from_str::<GeneratorConfig>(next());
        let schedule = Schedule::new(&schedule);
        let last = schedule.num_train_timesteps() - 1;
        for t in [0, last / 2, last] {
            let (alpha_t, sigma_t) = (schedule.alpha_t(t), schedule.sigma_t(t));
            assert!((alpha_t * alpha_t + sigma_t * sigma_t - 1.0).abs() < 1e-6, "{t}: {alpha_t} {sigma_t}");
        }
        for sampler in [Sampler::Ddim, Sampler::Ddpm, Sampler::Heun] {
            let _ = Trajectory::new(&schedule, sampler, 1 + last % 50, [-1.0, 1.0]);
        }
        if let Ok(generator) = generator {
            let _ = OneStep::new(&generator, &schedule);
        }
    });
});
