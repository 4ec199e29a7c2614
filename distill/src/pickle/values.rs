//! A pickle as a list of values. Opcodes: CPython's `pickletools`. Nothing is copied out of the memo and nothing here
//! recurses, so neither depth nor size can grow beyond the file's own. Nothing is called.

use std::collections::HashMap;
use std::rc::Rc;

use super::{Problem, Result, broken};

/// Modules whose classes a pickle of tensors refers to; anything else would be code.
const HARMLESS: [&str; 5] = ["collections", "torch", "torch._utils", "torch._tensor", "torch.storage"];

/// Values of a pickle, and values that it keeps: some hundred thousand tensors have fewer.
const MAX_VALUES: usize = 1 << 21;
/// Bytes of a name, a key or a class; longer texts are none of these.
const MAX_NAME: usize = 1 << 10;

/// Where a tensor's numbers are.
pub struct Described<'a> {
    /// Type of the storage.
    pub class: &'a str,
    /// Name of the storage.
    pub key: &'a str,
    /// First number.
    pub offset: usize,
    /// Numbers along each axis.
    pub size: Vec<usize>,
    /// Distance of neighbours along each axis.
    pub stride: Vec<usize>,
}

/// A value of a pickle; others are given by their place in the list.
enum Value {
    Class(Rc<str>, Rc<str>),
    Int(i64),
    Text(Rc<str>),
    /// A tuple or a list.
    Sequence(Vec<usize>),
    Dict(Vec<(usize, usize)>),
    /// What calling one with the arguments in the other would give.
    Call(usize, usize),
    Persistent(usize),
    Other,
}

/// All values of a pickle.
pub struct Values {
    all: Vec<Value>,
    /// The one that was pickled.
    pub root: usize,
}

impl Values {
    /// The value under a key of a dictionary.
    pub fn member(&self, dict: usize, key: &str) -> Option<usize> {
        let Value::Dict(all) = &self.all[dict] else { return None };
        all.iter()
            .find(|(k, _)| matches!(&self.all[*k], Value::Text(text) if **text == *key))
            .map(|(_, v)| *v)
    }

    /// The first class that no tensor needs.
    pub fn foreign(&self) -> Option<String> {
        self.all.iter().find_map(|value| match value {
            Value::Class(module, name) if !HARMLESS.contains(&&**module) => Some(format!("{module}.{name}")),
            _ => None,
        })
    }

    /// The tensors of a dictionary; other values are left out.
    pub fn described(&self, dict: usize) -> Result<Vec<(&str, Described<'_>)>> {
        let Value::Dict(all) = &self.all[dict] else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        for (key, value) in all {
            let Value::Text(name) = &self.all[*key] else { continue };
            if let Some(arguments) = self.tensor(*value, name)? {
                let described = self.describe(arguments);
                let malformed = || Problem::Broken(format!("tensor `{name}` is malformed"));
                found.push((&**name, described.ok_or_else(malformed)?));
            }
        }
        Ok(found)
    }

    /// The arguments of `_rebuild_tensor_v2`, if this is a tensor, perhaps wrapped as a parameter.
    fn tensor(&self, mut value: usize, name: &str) -> Result<Option<&[usize]>> {
        let malformed = || Problem::Broken(format!("tensor `{name}` is malformed"));
        for _ in 0..4 {
            let Value::Call(callable, arguments) = &self.all[value] else { return Ok(None) };
            let (Value::Class(module, class), Value::Sequence(arguments)) =
                (&self.all[*callable], &self.all[*arguments])
            else {
                return Ok(None);
            };
            match (&**module, &**class) {
                ("torch._utils", "_rebuild_tensor_v2") => return Ok(Some(arguments)),
                ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => {
                    value = *arguments.first().ok_or_else(malformed)?;
                }
                ("torch._tensor", "_rebuild_from_type_v2") => {
                    let [_, _, inner, ..] = arguments.as_slice() else { return Err(malformed()) };
                    let (Some(Value::Class(_, class)), Value::Sequence(inner)) =
                        (arguments.first().map(|f| &self.all[*f]), &self.all[*inner])
                    else {
                        return Err(malformed());
                    };
                    return match &**class {
                        "_rebuild_tensor_v2" => Ok(Some(inner)),
                        _ => Err(malformed()),
                    };
                }
                _ => return Ok(None),
            }
        }
        Err(malformed())
    }

    /// Arguments: storage, offset, size, stride, …; a storage is the persistent `("storage", class, key, place, count)`.
    fn describe(&self, arguments: &[usize]) -> Option<Described<'_>> {
        let [storage, offset, size, stride, ..] = arguments else { return None };
        let Value::Persistent(storage) = &self.all[*storage] else { return None };
        let Value::Sequence(storage) = &self.all[*storage] else { return None };
        let [_, class, key, ..] = storage.as_slice() else { return None };
        let (Value::Class(_, class), Value::Text(key)) = (&self.all[*class], &self.all[*key]) else {
            return None;
        };
        let (size, stride) = (self.sizes(*size)?, self.sizes(*stride)?);
        let offset = self.size(*offset)?;
        let described = Described { class, key, offset, size, stride };
        (described.size.len() == described.stride.len() && described.size.len() <= 8).then_some(described)
    }

    fn size(&self, value: usize) -> Option<usize> {
        match &self.all[value] {
            Value::Int(size) => usize::try_from(*size).ok(),
            _ => None,
        }
    }

    fn sizes(&self, value: usize) -> Option<Vec<usize>> {
        match &self.all[value] {
            Value::Sequence(all) => all.iter().map(|value| self.size(*value)).collect(),
            _ => None,
        }
    }

    /// Reads all opcodes up to the end mark.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut machine = Machine { bytes, all: Vec::new(), stack: Vec::new(), marks: Vec::new() };
        let mut memo = HashMap::new();
        let root = loop {
            let [code] = machine.fixed()?;
            match code {
                b'.' => break machine.pop()?,
                b'q' | b'r' | 0x94 => {
                    let key = match code {
                        b'q' => u32::from(machine.fixed::<1>()?[0]),
                        b'r' => u32::from_le_bytes(machine.fixed()?),
                        _ => memo.len() as u32,
                    };
                    memo.insert(key, machine.top()?);
                    within(memo.len())?;
                }
                b'h' | b'j' => {
                    let key = match code {
                        b'h' => u32::from(machine.fixed::<1>()?[0]),
                        _ => u32::from_le_bytes(machine.fixed()?),
                    };
                    let value = memo.get(&key).copied();
                    machine.stack.push(value.ok_or_else(|| damaged("a value that was not kept"))?);
                }
                code => machine.step(code)?,
            }
            within(machine.all.len())?;
        };
        Ok(Self { all: machine.all, root })
    }
}

fn within(count: usize) -> Result<()> {
    match count > MAX_VALUES {
        true => broken(format!("its pickle has more than {MAX_VALUES} values")),
        false => Ok(()),
    }
}

fn damaged(what: &str) -> Problem {
    Problem::Broken(format!("damaged pickle: {what}"))
}

/// The pickle machine: a stack of values, and the heights at which groups of them begin.
struct Machine<'a> {
    bytes: &'a [u8],
    all: Vec<Value>,
    stack: Vec<usize>,
    marks: Vec<usize>,
}

impl<'a> Machine<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let (head, rest) = self.bytes.split_at_checked(count).ok_or_else(|| damaged("it is cut short"))?;
        self.bytes = rest;
        Ok(head)
    }

    fn fixed<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.take(N)?.try_into().or_else(broken)
    }

    fn text(&mut self, count: usize) -> Result<&'a str> {
        std::str::from_utf8(self.take(count)?).or_else(broken)
    }

    fn line(&mut self) -> Result<Rc<str>> {
        let end = self.bytes.iter().position(|b| *b == b'\n').ok_or_else(|| damaged("it is cut short"))?;
        match self.text(end + 1)?.trim_end_matches(['\r', '\n']) {
            line if line.len() <= MAX_NAME => Ok(line.into()),
            _ => Err(damaged("a class has a name without end")),
        }
    }

    fn push(&mut self, value: Value) {
        self.all.push(value);
        self.stack.push(self.all.len() - 1);
    }

    fn pop(&mut self) -> Result<usize> {
        self.stack.pop().ok_or_else(|| damaged("it takes from an empty stack"))
    }

    fn top(&self) -> Result<usize> {
        self.stack.last().copied().ok_or_else(|| damaged("it looks at an empty stack"))
    }

    fn group(&mut self) -> Result<Vec<usize>> {
        let mark = self.marks.pop().filter(|mark| *mark <= self.stack.len());
        Ok(self.stack.split_off(mark.ok_or_else(|| damaged("a group has no beginning"))?))
    }

    fn last(&mut self, count: usize) -> Result<Vec<usize>> {
        let from = self.stack.len().checked_sub(count);
        Ok(self.stack.split_off(from.ok_or_else(|| damaged("it takes from an empty stack"))?))
    }

    fn append(&mut self, values: Vec<usize>) -> Result<()> {
        let list = self.top()?;
        match &mut self.all[list] {
            Value::Sequence(all) => all.extend(values),
            _ => return Err(damaged("it appends to what is no list")),
        }
        Ok(())
    }

    fn insert(&mut self, values: &[usize]) -> Result<()> {
        let dict = self.top()?;
        match &mut self.all[dict] {
            Value::Dict(all) if values.len().is_multiple_of(2) => {
                all.extend(values.as_chunks::<2>().0.iter().map(|[key, value]| (*key, *value)));
                Ok(())
            }
            _ => Err(damaged("it adds to what is no dictionary")),
        }
    }

    /// Everything but the memo and the end.
    fn step(&mut self, code: u8) -> Result<()> {
        match code {
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.group()?),
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }
            b'c' => {
                let value = Value::Class(self.line()?, self.line()?);
                self.push(value);
            }
            0x93 => {
                let pair = self.last(2)?;
                let [Value::Text(module), Value::Text(name)] = [&self.all[pair[0]], &self.all[pair[1]]]
                else {
                    return Err(damaged("a class without a name"));
                };
                let value = Value::Class(module.clone(), name.clone());
                self.push(value);
            }
            b'K' => {
                let [value] = self.fixed()?;
                self.push(Value::Int(i64::from(value)));
            }
            b'M' => {
                let value = u16::from_le_bytes(self.fixed()?);
                self.push(Value::Int(i64::from(value)));
            }
            b'J' => {
                let value = i32::from_le_bytes(self.fixed()?);
                self.push(Value::Int(i64::from(value)));
            }
            0x8a => {
                let [count] = self.fixed()?;
                let bytes = self.take(usize::from(count))?;
                let sign = if bytes.last().is_some_and(|b| *b >= 0x80) { 0xff } else { 0 };
                let mut wide = [sign; 8];
                match wide.get_mut(..bytes.len()) {
                    Some(low) => low.copy_from_slice(bytes),
                    None => return Err(damaged("a number of more than 64 bits")),
                }
                self.push(Value::Int(i64::from_le_bytes(wide)));
            }
            b'X' | b'T' | b'B' => {
                let count = u32::from_le_bytes(self.fixed()?);
                self.string(code, count as usize)?;
            }
            0x8c | b'U' | b'C' => {
                let [count] = self.fixed()?;
                self.string(code, usize::from(count))?;
            }
            b'G' => {
                self.take(8)?;
                self.push(Value::Other);
            }
            b'N' | 0x88 | 0x89 | 0x8f => self.push(Value::Other),
            b')' | b']' => self.push(Value::Sequence(Vec::new())),
            b'}' => self.push(Value::Dict(Vec::new())),
            b't' | b'l' => {
                let group = self.group()?;
                self.push(Value::Sequence(group));
            }
            b'd' => {
                let group = self.group()?;
                self.push(Value::Dict(Vec::new()));
                self.insert(&group)?;
            }
            0x85..=0x87 => {
                let values = self.last(usize::from(code - 0x84))?;
                self.push(Value::Sequence(values));
            }
            b'a' => {
                let value = self.pop()?;
                self.append(vec![value])?;
            }
            b'e' => {
                let group = self.group()?;
                self.append(group)?;
            }
            b's' => {
                let pair = self.last(2)?;
                self.insert(&pair)?;
            }
            b'u' => {
                let group = self.group()?;
                self.insert(&group)?;
            }
            b'Q' => {
                let id = self.pop()?;
                self.push(Value::Persistent(id));
            }
            b'R' | 0x81 => {
                let pair = self.last(2)?;
                let dict = matches!(
                    &self.all[pair[0]],
                    Value::Class(module, name)
                        if **module == *"collections" && ["OrderedDict", "defaultdict"].contains(&&**name)
                );
                self.push(if dict { Value::Dict(Vec::new()) } else { Value::Call(pair[0], pair[1]) });
            }
            // What BUILD would set on an object: a state dict's bookkeeping.
            b'b' => drop(self.pop()?),
            other => return Err(damaged(&format!("opcode {other:#04x} is none that tensors need"))),
        }
        Ok(())
    }

    fn string(&mut self, code: u8, count: usize) -> Result<()> {
        let value = match code {
            b'X' | 0x8c if count <= MAX_NAME => Value::Text(self.text(count)?.into()),
            _ => {
                self.take(count)?;
                Value::Other
            }
        };
        self.push(value);
        Ok(())
    }
}
