//! Seeds as people write them: one, a list, ranges, the two ends of an interpolation.

use std::str::FromStr;

/// Seeds in the order in which they were named, at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seeds(pub Vec<u32>);

/// The seeds at the two ends of an interpolation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// Of the first image.
    pub from: u32,
    /// Of the last image.
    pub to: u32,
}

/// Seeds that one command line may name.
const MOST: u32 = 1_000_000;

impl FromStr for Seeds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut seeds = Vec::new();
        for part in text.split(',') {
            match part.split_once("..") {
                None => seeds.push(seed(part)?),
                Some((from, to)) => {
                    let (from, to) = (seed(from)?, seed(to)?);
                    if from > to {
                        return Err(format!("got the seeds {part}, expected the smaller one first"));
                    }
                    if to - from >= MOST {
                        return Err(format!(
                            "got more than {MOST} seeds; --count draws many images of one seed"
                        ));
                    }
                    seeds.extend(from..=to);
                }
            }
        }
        Ok(Self(seeds))
    }
}

impl FromStr for Ends {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (from, to) = text.split_once("..").ok_or("expected two seeds as A..B")?;
        let (from, to) = (seed(from)?, seed(to)?);
        if from == to { Err("expected two different seeds".to_owned()) } else { Ok(Self { from, to }) }
    }
}

fn seed(text: &str) -> Result<u32, String> {
    text.trim().parse().map_err(|_| format!("got `{text}`, expected a seed from 0 to {}", u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_have_both_ends_and_lists_keep_their_order() {
        let seeds = |text: &str| text.parse::<Seeds>().map(|s| s.0);
        assert_eq!(seeds("7"), Ok(vec![7]));
        assert_eq!(seeds("3..6"), Ok(vec![3, 4, 5, 6]));
        assert_eq!(seeds("9,1..2, 9"), Ok(vec![9, 1, 2, 9]));
        for wrong in ["", "3..", "6..3", "1,,2", "-1", "4294967296", "0..4294967295"] {
            assert!(seeds(wrong).is_err(), "{wrong}");
        }
        assert_eq!("4..2".parse(), Ok(Ends { from: 4, to: 2 }));
        assert!("4".parse::<Ends>().is_err() && "4..4".parse::<Ends>().is_err());
    }
}
