//! `dmd-distill`: temporary training driver.
use std::path::PathBuf;
use dmd_distill::{run::Run, teacher::*};
#[global_allocator]
static ALLOC: mimalloc::MiMalloc = mimalloc::MiMalloc;
fn main() -> anyhow::Result<()> {
    let a: Vec<String> = std::env::args().collect();
    let n = |i: usize| a[i].parse::<u64>().unwrap();
    let o = TeacherOptions { command: "teacher".into(), base: "ddpm-fashion".into(), data: None, train_steps: n(2), batch: n(3) as usize, lr: a[4].parse().unwrap(), warmup: 100, ema: 0.999, drop_label: 0.1, seed: 1, save_every: 200, sample_every: n(5) };
    dmd_distill::progress::handle_interrupts();
    let p = PathBuf::from(&a[1]);
    let run = if p.exists() { Run::open(&p)? } else { let r = Run::create(Some(&p), "x")?; r.save_options(&o)?; r };
    println!("{}", train(&run, &o, &candle_core::Device::Cpu)?.display());
    Ok(())
}
