//! In which order images are trained on: a new random permutation every epoch, as a function of seed and epoch.
//! Must not keep anything that a resumed run could not compute again.

use crate::random::{Purpose, Random};

/// The order of the images of a training.
pub struct Order {
    seed: u32,
    count: usize,
    epoch: u64,
    order: Vec<u32>,
}

impl Order {
    /// Of `count` images.
    pub fn new(seed: u32, count: usize) -> Self {
        let order = Random::new(seed, Purpose::Order, 0).permutation(count);
        Self { seed, count, epoch: 0, order }
    }

    /// Indices of update number `step`; a batch may begin in one epoch and end in the next.
    pub fn batch(&mut self, step: u64, batch: usize) -> Vec<usize> {
        let first = step * batch as u64;
        let mut index = |position: u64| {
            let epoch = position / self.count as u64;
            if epoch != self.epoch {
                self.epoch = epoch;
                self.order = Random::new(self.seed, Purpose::Order, epoch).permutation(self.count);
            }
            self.order[(position % self.count as u64) as usize] as usize
        };
        (first..first + batch as u64).map(&mut index).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_has_every_image_once() {
        let mut order = Order::new(3, 10);
        let mut all: Vec<usize> = (0..5).flat_map(|step| order.batch(step, 4)).collect();
        assert_eq!(order.batch(1, 4), all[4..8], "an order that can be asked for again");
        let second = all.split_off(10);
        assert_ne!(all, second);
        for mut epoch in [all, second] {
            epoch.sort_unstable();
            assert_eq!(epoch, (0..10).collect::<Vec<_>>());
        }
    }
}
