//! Names and shapes that diffusers gave to attention layers before version 0.17, in 2023; most published checkpoints
//! have them. Invariant: renaming only, no values, no file access.

use crate::net::shapes::Summary;

/// Parts of names, then and now.
const RENAMED: [(&str, &str); 4] =
    [(".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")];

/// Name and shape of a checkpoint's tensor as the network has it today: the layers of an attention are called `to_q`,
/// `to_k`, `to_v` and `to_out.0`, and a 1x1 convolution `[out, in, 1, 1]` where the network has a matrix is that
/// matrix. What the network has under its own name, or does not know at all, is returned as it is.
pub fn current(summary: &Summary, name: &str, shape: &[usize]) -> (String, Vec<usize>) {
    let renamed = || RENAMED.iter().fold(name.to_owned(), |name, (old, new)| name.replace(old, new));
    let known = |name: &String| summary.parameters.contains_key(name);
    let name =
        Some(name.to_owned()).filter(known).or(Some(renamed()).filter(known)).unwrap_or(name.to_owned());
    let shape = match (summary.parameters.get(&name).map(Vec::as_slice), shape) {
        (Some(matrix @ [out, input]), [a, b, 1, 1]) if (out, input) == (a, b) => matrix,
        _ => shape,
    };
    (name, shape.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;
    use crate::net::shapes::summarise;

    #[test]
    fn old_names_become_those_of_today() {
        let config = r#"{"_class_name":"UNet2DModel","sample_size":8,"block_out_channels":[32],
            "down_block_types":["DownBlock2D"],"up_block_types":["UpBlock2D"]}"#;
        let summary = summarise(&ModelConfig::from_json(config).unwrap()).unwrap();
        let middle = "mid_block.attentions.0";
        for (old, new) in [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")] {
            let (weight, bias) = (format!("{middle}.{new}.weight"), format!("{middle}.{new}.bias"));
            let old = |suffix: &str| format!("{middle}.{old}.{suffix}");
            for name in [&old("weight"), &weight] {
                for shape in [&[32, 32][..], &[32, 32, 1, 1]] {
                    assert_eq!(current(&summary, name, shape), (weight.clone(), vec![32, 32]));
                }
            }
            assert_eq!(current(&summary, &old("bias"), &[32]), (bias, vec![32]));
            let wrong = [32, 16, 1, 1];
            assert_eq!(current(&summary, &old("weight"), &wrong), (weight, wrong.to_vec()));
        }
        let convolution = [32, 3, 3, 3];
        for name in ["conv_in.weight", "extra.query.weight"] {
            assert_eq!(current(&summary, name, &convolution), (name.to_owned(), convolution.to_vec()));
        }
    }
}
