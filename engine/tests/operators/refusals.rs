//! What the engine would compute otherwise than ONNX says, or not at all, is refused by name.

use dmd_engine::message::{Attribute, Node, Tensor, data_type};

use crate::support::{floats, int, ints, node};
use crate::{integers, run, text};

#[test]
fn what_cannot_run_is_named() {
    let refused = |shape: &[usize], node: Node, stored: Vec<Tensor>| {
        let x = vec![0.0; shape.iter().product()];
        run(shape, &x, vec![node], stored).expect_err("it was accepted").to_string()
    };
    let unknown = refused(&[2], node("Frobnicate", &["x"], "y"), vec![]);
    assert!(
        unknown.starts_with("node `y` (Frobnicate): this operator is not one that `dmd-export` writes"),
        "{unknown}"
    );
    let grouped = Node { attribute: vec![int("group", 2)], ..node("Conv", &["x", "w"], "y") };
    let stored = || vec![floats("w", &[2, 1, 1, 1], &[0.0; 2])];
    assert_eq!(refused(&[1, 2, 3, 3], grouped, stored()), "node `y` (Conv): got `group` 2, expected 1");
    let shapes = refused(&[1, 2, 3, 3], node("Conv", &["x", "w"], "y"), stored());
    assert_eq!(shapes, "node `y` (Conv): got x of shape [1, 2, 3, 3] for weights of shape [2, 1, 1, 1]");
    let short = vec![floats("w", &[3], &[0.0; 2])];
    assert_eq!(
        refused(&[3], node("Add", &["x", "w"], "y"), short),
        "node `y` (Add): `w` has 2 values, expected [3]"
    );
    let empty = refused(&[2, 0, 3], node("Neg", &["x"], "y"), vec![]);
    assert_eq!(empty, "node `y`: gives no values, expected some");
    let absent = refused(&[3], node("Add", &["x", "w"], "y"), vec![]);
    assert_eq!(absent, "node `y` (Add): reads `w`, which nothing defines");
    let fit = refused(&[3], node("Add", &["x", "w"], "y"), vec![floats("w", &[2], &[0.0; 2])]);
    assert_eq!(fit, "node `y` (Add): got shapes [3] and [2]");
    let rows = vec![floats("w", &[2, 2], &[0.0; 4]), floats("b", &[2, 1], &[0.0; 2])];
    let bias = refused(&[2, 2], node("Gemm", &["x", "w", "b"], "y"), rows);
    assert_eq!(bias, "node `y` (Gemm): got a bias of shape [2, 1], expected [2]");
    let nearest = |attribute| {
        let nearest = [
            text("mode", "nearest"),
            text("coordinate_transformation_mode", "asymmetric"),
            text("nearest_mode", "floor"),
            attribute,
        ];
        Node { attribute: nearest.into(), ..node("Resize", &["x", "", "scales"], "y") }
    };
    let scales = vec![floats("scales", &[4], &[1.0, 1.0, 2.0, 1.0])];
    let axes = refused(&[1, 1, 2, 2], nearest(ints("axes", &[0, 1, 3, 2])), scales);
    assert_eq!(axes, "node `y` (Resize): got `axes`, expected all in their order");
}

#[test]
fn weights_of_blocks_are_refused() {
    let refused = |scale: &[usize], attribute: Vec<Attribute>| {
        let weights =
            Tensor { data_type: data_type::INT8, raw_data: vec![1; 4].into(), ..floats("w", &[2, 2], &[]) };
        let stored = vec![weights, floats("scale", scale, &vec![0.5; scale.iter().product()])];
        let nodes = vec![
            Node { attribute, ..node("DequantizeLinear", &["w", "scale"], "f") },
            node("MatMul", &["x", "f"], "y"),
        ];
        run(&[1, 2], &[1.0, 2.0], nodes, stored).map(|(_, y)| y).map_err(|e| e.to_string())
    };
    assert_eq!(refused(&[2], vec![int("axis", 1)]), Ok(vec![1.5, 1.5]));
    let block = refused(&[2, 1], vec![int("axis", 1), int("block_size", 2)]);
    assert_eq!(block, Err("node `f` (DequantizeLinear): got `block_size` 2, expected 0".to_owned()));
    assert!(refused(&[2, 1], vec![int("axis", 1)]).is_err());
}

/// Their quotient is whole, that of floats is not.
#[test]
fn integers_are_not_divided() {
    let cast = |input: &str, to: i32, output: &str| Node {
        attribute: vec![int("to", i64::from(to))],
        ..node("Cast", &[input], output)
    };
    let divided = |to: i32, by: &[Tensor], nodes: Vec<Node>| {
        let nodes = [vec![cast("x", to, "c"), node("Add", &["c", "c"], "twice")], nodes].concat();
        run(&[2], &[3.5, 5.0], nodes, by.to_vec()).map(|(_, y)| y).map_err(|e| e.to_string())
    };
    let by = |nodes: &[Node]| [&[node("Div", &["twice", "by"], "y")], nodes].concat();
    let error = Err("node `y` (Div): got integers, expected floats".to_owned());
    assert_eq!(divided(data_type::INT64, &[integers("by", &[4])], by(&[])), error);
    assert_eq!(divided(data_type::FLOAT, &[floats("by", &[1], &[4.0])], by(&[])), Ok(vec![1.75, 2.5]));
    let float = vec![cast("twice", data_type::FLOAT, "float"), node("Div", &["float", "by"], "y")];
    assert_eq!(divided(data_type::INT64, &[floats("by", &[1], &[4.0])], float), Ok(vec![1.5, 2.5]));
}
