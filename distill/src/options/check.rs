//! What options of a distillation must hold together.

use dmd_core::schedule::Schedule;

use crate::error::{Error, Result};
use crate::train::DistillOptions;

/// Finds the first rule that is broken.
pub fn check(o: &DistillOptions, schedule: &Schedule) -> Result<()> {
    let total = schedule.num_train_timesteps();
    let rules = [
        (o.train_steps > 0 && o.batch > 0, "`--train-steps` and `--batch` must be at least 1"),
        (
            o.save_every > 0 && o.sample_every > 0 && o.eval_every > 0,
            "`--save-every`, `--sample-every` and `--eval-every` must be at least 1",
        ),
        (o.clip >= 0.0, "`--clip` must not be negative"),
        (o.samples > 0, "`--samples` must be at least 1"),
        (o.fake_updates > 0 && o.dm_draws > 0, "`--fake-updates` and `--dm-draws` must be at least 1"),
        ((0.0..=1.0).contains(&o.reg_until), "`--reg-until` lies between 0 and 1"),
        (
            o.reg_until == 1.0 || o.dm_weight > 0.0 || o.gan_weight > 0.0,
            "after `--reg-until` nothing would be left to learn from\n\nhint: leave it out, or give another loss a weight",
        ),
        (
            o.reg_steps == 0 || (o.lambda_reg > 0.0 && o.has_critic()),
            "`--reg-steps` go before distribution matching, and need pairs\n\nhint: leave them out, or give `--lambda-reg` \
             and `--dm-weight` a weight",
        ),
        (
            o.lr_reg > 0.0
                && o.lr_reg < 1.0
                && o.lr > 0.0
                && o.lr < 1.0
                && o.lr_fake > 0.0
                && o.lr_fake < 1.0,
            "learning rates lie between 0 and 1",
        ),
        ((0.0..1.0).contains(&o.ema), "`--ema` lies from 0 to below 1"),
        (
            [o.lambda_reg, o.dm_weight, o.gan_weight, o.gan_weight_fake]
                .iter()
                .all(|weight| *weight >= 0.0 && weight.is_finite()),
            "weights of losses must not be negative",
        ),
        (
            o.gan_weight == 0.0 || o.data.is_some(),
            "the adversarial loss needs real images\n\nhint: `--data NAME|DIR`, or `--gan-weight 0`",
        ),
        (
            o.lambda_reg > 0.0 || o.dm_weight > 0.0 || o.gan_weight > 0.0,
            "all weights are 0: the generator would learn nothing",
        ),
        (
            0.0 <= o.t_min && o.t_min < o.t_max && o.t_max <= 1.0,
            "`--t-min` and `--t-max` lie between 0 and 1, the first below the second",
        ),
        (o.input_scale > 0.0 && o.input_scale.is_finite(), "`--input-scale` must be positive"),
        ((1..=total).contains(&o.pair_steps), "`--pair-steps` lies between 1 and the base's number of steps"),
        (
            o.lambda_reg == 0.0 || o.pairs > 0,
            "`--pairs 0` leaves the regression loss without pairs\n\nhint: add `--lambda-reg 0`",
        ),
    ];
    match rules.into_iter().find(|(holds, _)| !holds) {
        Some((_, rule)) => Err(Error::Request(rule.to_owned())),
        None => Ok(()),
    }
}
