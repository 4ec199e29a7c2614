//! How much is in an ONNX file, told from its bytes before anything is decoded: a message of two bytes becomes hundreds in
//! memory, so that a file of some megabytes could ask for all there is. Protocol Buffers' encoding, onnx.proto's field numbers.
//! Nothing here knows what a model means.

use crate::{Error, Result};

/// Messages and texts that a file may have; the bundled generator has 3,306.
pub const MAX_FIELDS: usize = 1 << 18;

/// Messages that hold messages.
#[derive(Clone, Copy)]
enum Kind {
    Model,
    Graph,
    Node,
    Attribute,
    Tensor,
    Sparse,
    Value,
    Type,
    TensorType,
    Elements,
    Map,
    Shape,
    Training,
    Function,
    Leaf,
}

impl Kind {
    /// What the field `number` of this message is; none if it holds text or bytes.
    fn field(self, number: u64) -> Option<Self> {
        Some(match (self, number) {
            (Self::Model, 7) | (Self::Attribute, 6 | 11) | (Self::Training, 1 | 2) => Self::Graph,
            (Self::Model, 20) => Self::Training,
            (Self::Model, 25) => Self::Function,
            (Self::Graph, 1) | (Self::Function, 7) => Self::Node,
            (Self::Graph, 5) | (Self::Attribute, 5 | 10) | (Self::Sparse, 1 | 2) => Self::Tensor,
            (Self::Graph, 11..=13) | (Self::Function, 12) => Self::Value,
            (Self::Graph, 15) | (Self::Attribute, 22 | 23) => Self::Sparse,
            (Self::Node, 5) | (Self::Function, 11) => Self::Attribute,
            (Self::Value | Self::Map, 2) | (Self::Attribute, 14 | 15) | (Self::Elements, 1) => Self::Type,
            (Self::Type, 1 | 8) => Self::TensorType,
            (Self::Type, 4 | 9) => Self::Elements,
            (Self::Type, 5) => Self::Map,
            (Self::TensorType, 2) => Self::Shape,
            (Self::Shape, 1)
            | (Self::Model, 8 | 14)
            | (Self::Graph, 14 | 16)
            | (Self::Node, 9)
            | (Self::Tensor, 3 | 13 | 16)
            | (Self::Training, 3 | 4)
            | (Self::Function, 9 | 14) => Self::Leaf,
            _ => return None,
        })
    }
}

/// Refuses an ONNX file with more than [`MAX_FIELDS`] messages and texts. Damage is left to whoever decodes it.
pub fn check(bytes: &[u8]) -> Result<()> {
    let mut open = vec![(bytes, Kind::Model)];
    let mut fields = 0;
    while let Some((mut rest, kind)) = open.pop() {
        while !rest.is_empty() {
            let Some((number, content)) = next(&mut rest) else { break };
            let Some(content) = content else { continue };
            fields += 1;
            if fields > MAX_FIELDS {
                return Err(Error::Message(format!(
                    "got more than {MAX_FIELDS} messages and texts, expected a network of fewer"
                )));
            }
            open.extend(kind.field(number).map(|kind| (content, kind)));
        }
    }
    Ok(())
}

/// The next field: its number, and its bytes if it has a length; none where no decoder could go on.
fn next<'a>(rest: &mut &'a [u8]) -> Option<(u64, Option<&'a [u8]>)> {
    let key = varint(rest)?;
    let skipped = match key & 7 {
        0 => {
            varint(rest)?;
            return Some((key >> 3, None));
        }
        1 => 8,
        5 => 4,
        2 => {
            let length = usize::try_from(varint(rest)?).ok()?;
            let (content, after) = rest.split_at_checked(length)?;
            *rest = after;
            return Some((key >> 3, Some(content)));
        }
        3 | 4 => 0, // the fields of a group, which no message of ONNX has, count as the message's own
        _ => return None,
    };
    *rest = rest.split_at_checked(skipped)?.1;
    Some((key >> 3, None))
}

fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, after) = rest.split_first()?;
        *rest = after;
        value |= u64::from(byte & 0x7f) << shift;
        if *byte < 0x80 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(number: u64, content: &[u8]) -> Vec<u8> {
        let varint = |mut value: u64| {
            let mut bytes = Vec::new();
            while value >= 0x80 {
                bytes.push(value as u8 | 0x80);
                value >>= 7;
            }
            bytes.push(value as u8);
            bytes
        };
        [varint(number << 3 | 2), varint(content.len() as u64), content.to_vec()].concat()
    }

    #[test]
    fn messages_are_counted_wherever_they_are() {
        let empty = |number, count| field(number, &[]).repeat(count);
        let within = |path: &[u64], content: Vec<u8>| {
            path.iter().rev().fold(content, |content, number| field(*number, &content))
        };
        for path in [
            &[14][..],                        // entries of the model
            &[7, 1],                          // nodes
            &[7, 1, 5],                       // attributes
            &[7, 1, 5, 5, 13],                // entries of a tensor in an attribute
            &[7, 1, 5, 6, 1, 5, 11, 1],       // nodes of a graph in a graph
            &[7, 11, 2, 1, 2, 1],             // dimensions
            &[7, 11, 2, 5, 2, 4, 1, 1, 2, 1], // of tensors in lists in a map
            &[20, 1, 1],                      // nodes of a graph for training
            &[25, 7, 5],                      // attributes of a function's node
        ] {
            let (last, path) = path.split_last().unwrap();
            let file = |count| within(path, empty(*last, count));
            assert!(check(&file(MAX_FIELDS - path.len())).is_ok(), "{path:?}");
            let error = check(&file(MAX_FIELDS + 1 - path.len())).unwrap_err().to_string();
            assert!(error.contains("262144 messages and texts"), "{path:?}: {error}");
        }
        // Weights are bytes, whatever they look like.
        assert!(check(&within(&[7, 5, 9], empty(1, MAX_FIELDS + 1))).is_ok());
    }

    #[test]
    fn numbers_and_damage_are_passed_over() {
        let many = field(14, &[]).repeat(MAX_FIELDS + 1);
        // A varint, eight bytes, four bytes, a group's ends, none of which hides what follows.
        let passed = [&[0x08, 0x96, 0x01, 0x09][..], &[0; 8], &[0x0d], &[0; 4], &[0x0b, 0x0c]].concat();
        assert!(check(&passed).is_ok());
        assert!(check(&[passed, many.clone()].concat()).is_err());
        for damage in [&[0x0f][..], &[0x0a, 0x7f], &[0xff; 11], &[0x09, 0]] {
            assert!(check(damage).is_ok());
            assert!(check(&[damage, &many].concat()).is_ok(), "no decoder goes on");
        }
    }
}
