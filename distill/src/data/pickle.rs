//! The part of Python's pickle format that arrays of bytes with labels need, protocols 2 to 5, as old and new versions of
//! Python and numpy write them. A pickle is a program: here it only ever builds plain values, and one that names any function but
//! numpy's own constructors is refused. Opcodes: CPython's `pickletools`.
//! (candle's reader lacks the strings of Python 2, in which CIFAR-10 is written; the crate `serde-pickle` drops or refuses arrays.)

use std::collections::BTreeMap;

/// Why a pickle cannot be read.
#[derive(Debug, PartialEq, Eq)]
pub enum Error {
    /// It names a function or class that no array needs.
    Foreign(String),
    /// It is damaged, or holds what no array needs.
    Broken(String),
}

type Result<T> = std::result::Result<T, Error>;

/// Values of a pickle, and values that it keeps: a batch of 10,000 images has some ten thousand.
const MAX_VALUES: usize = 1 << 20;

/// What an array of bytes is made with.
const KNOWN: [&str; 5] = [
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",
];

/// A value, by its place among all values of the pickle: lists and dictionaries grow after others refer to them.
pub type Id = usize;

#[derive(Debug)]
enum Value {
    Nothing,
    Bool(bool),
    Int(i64),
    Float,
    /// Bytes, or a string of Python 2.
    Bytes(Vec<u8>),
    Text(String),
    List(Vec<Id>),
    Tuple(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(String),
    /// What a function makes of its arguments, and the state that is given to it afterwards.
    Made {
        function: Id,
        arguments: Id,
        state: Option<Id>,
    },
}

/// A pickle as plain values.
#[derive(Debug)]
pub struct Pickle {
    values: Vec<Value>,
    root: Id,
}

impl Pickle {
    /// Reads one.
    pub fn read(bytes: &[u8]) -> Result<Self> {
        let mut machine = Machine {
            rest: bytes,
            values: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: BTreeMap::new(),
            left: bytes.len(),
        };
        let root = machine.run()?;
        Ok(Self { values: machine.values, root })
    }

    /// An entry of the dictionary that the pickle is.
    pub fn entry(&self, key: &str) -> Option<Id> {
        let Value::Dict(entries) = &self.values[self.root] else { return None };
        entries.iter().find(|(k, _)| self.text(*k) == Some(key.as_bytes())).map(|(_, value)| *value)
    }

    /// A list of numbers.
    pub fn integers(&self, id: Id) -> std::result::Result<Vec<i64>, String> {
        let Value::List(all) = &self.values[id] else { return Err("expected a list of numbers".into()) };
        all.iter()
            .map(|id| self.integer(*id).ok_or_else(|| "expected a list of numbers".to_owned()))
            .collect()
    }

    /// A numpy array of unsigned bytes: its shape and content.
    pub fn bytes_array(&self, id: Id) -> std::result::Result<(Vec<usize>, &[u8]), String> {
        self.array(id).ok_or_else(|| "expected a numpy array of unsigned bytes in C order".to_owned())
    }

    /// The state of an array is `(version, shape, dtype, Fortran order, content)`.
    fn array(&self, id: Id) -> Option<(Vec<usize>, &[u8])> {
        let Value::Made { function, state, .. } = &self.values[id] else { return None };
        let Value::Global(name) = &self.values[*function] else { return None };
        let [_, shape, dtype, fortran, content] = self.tuple((*state)?)? else { return None };
        let shape = self
            .tuple(*shape)?
            .iter()
            .map(|n| self.integer(*n)?.try_into().ok())
            .collect::<Option<Vec<usize>>>()?;
        let Value::Made { function: kind, arguments, .. } = &self.values[*dtype] else { return None };
        let plain = matches!(&self.values[*kind], Value::Global(name) if name == "numpy.dtype")
            && matches!(self.text(*self.tuple(*arguments)?.first()?)?, b"u1" | b"|u1" | b"uint8")
            && matches!(self.values[*fortran], Value::Bool(false) | Value::Int(0));
        let Value::Bytes(content) = &self.values[*content] else { return None };
        let size = shape.iter().try_fold(1usize, |a, b| a.checked_mul(*b))?;
        (name.ends_with("._reconstruct") && plain && size == content.len())
            .then_some((shape, content.as_slice()))
    }

    fn text(&self, id: Id) -> Option<&[u8]> {
        match &self.values[id] {
            Value::Bytes(bytes) => Some(bytes),
            Value::Text(text) => Some(text.as_bytes()),
            _ => None,
        }
    }

    fn integer(&self, id: Id) -> Option<i64> {
        if let Value::Int(value) = self.values[id] { Some(value) } else { None }
    }

    fn tuple(&self, id: Id) -> Option<&[Id]> {
        if let Value::Tuple(all) = &self.values[id] { Some(all) } else { None }
    }
}

/// Carries out opcodes.
struct Machine<'a> {
    rest: &'a [u8],
    values: Vec<Value>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: BTreeMap<u64, Id>,
    /// Bytes that texts may still be encoded to: no more than there are in the file, as each is needed once.
    left: usize,
}

fn broken<T>(problem: &str) -> Result<T> {
    Err(Error::Broken(problem.to_owned()))
}

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<Id> {
        loop {
            if self.values.len().max(self.memo.len()) > MAX_VALUES {
                return Err(Error::Broken(format!("it has more than {MAX_VALUES} values")));
            }
            match self.take(1)?[0] {
                b'.' => return self.pop(),
                0x80 => self.skip(1)?, // version of the protocol
                0x95 => self.skip(8)?, // length of a frame
                b'(' => self.marks.push(self.stack.len()),
                b'0' => {
                    self.pop()?;
                }
                b'N' => self.push(Value::Nothing),
                0x88 => self.push(Value::Bool(true)),
                0x89 => self.push(Value::Bool(false)),
                b'K' => self.integer(1)?,
                b'M' => self.integer(2)?,
                b'J' => {
                    let bytes = self.take(4)?;
                    self.push(Value::Int(i64::from(i32::from_le_bytes([
                        bytes[0], bytes[1], bytes[2], bytes[3],
                    ]))));
                }
                0x8a => self.long()?,
                b'G' => {
                    self.skip(8)?;
                    self.push(Value::Float);
                }
                b'U' | b'C' => self.bytes(1)?,
                b'T' | b'B' => self.bytes(4)?,
                0x8e => self.bytes(8)?,
                0x8c => self.unicode(1)?,
                b'X' => self.unicode(4)?,
                0x8d => self.unicode(8)?,
                b']' => self.push(Value::List(vec![])),
                b')' => self.push(Value::Tuple(vec![])),
                b'}' => self.push(Value::Dict(vec![])),
                0x85 => self.tuple(1)?,
                0x86 => self.tuple(2)?,
                0x87 => self.tuple(3)?,
                b't' => {
                    let all = self.since_mark()?;
                    self.push(Value::Tuple(all));
                }
                b'a' => {
                    let item = self.pop()?;
                    self.extend_list(vec![item])?;
                }
                b'e' => {
                    let all = self.since_mark()?;
                    self.extend_list(all)?;
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.extend_dict(&[key, value])?;
                }
                b'u' => {
                    let all = self.since_mark()?;
                    self.extend_dict(&all)?;
                }
                b'q' => self.put(1)?,
                b'r' => self.put(4)?,
                0x94 => {
                    let top = self.top()?;
                    self.memo.insert(self.memo.len() as u64, top);
                }
                b'h' => self.get(1)?,
                b'j' => self.get(4)?,
                b'c' => {
                    let name = format!("{}.{}", self.line()?, self.line()?);
                    self.global(name)?;
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    match (&self.values[module], &self.values[name]) {
                        (Value::Text(module), Value::Text(name)) => {
                            self.global(format!("{module}.{name}"))?
                        }
                        _ => return broken("the name of a class is no text"),
                    }
                }
                b'R' => self.reduce()?,
                b'b' => {
                    let (given, made) = (self.pop()?, self.top()?);
                    match &mut self.values[made] {
                        Value::Made { state, .. } => *state = Some(given),
                        _ => return broken("state is given to something that has none"),
                    }
                }
                code => {
                    return Err(Error::Broken(format!(
                        "opcode {code:#04x} is not needed for arrays and labels"
                    )));
                }
            }
        }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let Some((taken, rest)) = self.rest.split_at_checked(count) else { return broken("it is cut short") };
        self.rest = rest;
        Ok(taken)
    }

    fn skip(&mut self, count: usize) -> Result<()> {
        self.take(count).map(|_| ())
    }

    /// An unsigned number of so many bytes, the lowest first.
    fn number(&mut self, width: usize) -> Result<u64> {
        Ok(self.take(width)?.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
    }

    /// Bytes whose number precedes them in so many bytes.
    fn sized(&mut self, width: usize) -> Result<&'a [u8]> {
        let count = self.number(width)?;
        self.take(usize::try_from(count).unwrap_or(usize::MAX))
    }

    fn line(&mut self) -> Result<String> {
        let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') else {
            return broken("it is cut short");
        };
        let line = self.take(end + 1)?;
        Ok(String::from_utf8_lossy(&line[..end]).into_owned())
    }

    fn push(&mut self, value: Value) {
        self.values.push(value);
        self.stack.push(self.values.len() - 1);
    }

    fn pop(&mut self) -> Result<Id> {
        let above = self.marks.last().is_none_or(|mark| self.stack.len() > *mark);
        self.stack.pop().filter(|_| above).map_or_else(|| broken("a value is missing"), Ok)
    }

    fn top(&self) -> Result<Id> {
        self.stack.last().copied().map_or_else(|| broken("a value is missing"), Ok)
    }

    fn since_mark(&mut self) -> Result<Vec<Id>> {
        match self.marks.pop() {
            Some(mark) if mark <= self.stack.len() => Ok(self.stack.split_off(mark)),
            _ => broken("a mark is missing"),
        }
    }

    fn integer(&mut self, width: usize) -> Result<()> {
        let number = self.number(width)?;
        self.push(Value::Int(number as i64));
        Ok(())
    }

    /// A signed number of up to eight bytes.
    fn long(&mut self) -> Result<()> {
        let bytes = self.sized(1)?;
        if bytes.len() > 8 {
            return broken("a number is too large");
        }
        let unused = 64 - 8 * bytes.len() as u32;
        let number = bytes.iter().rev().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte));
        self.push(Value::Int(if bytes.is_empty() { 0 } else { (number << unused) as i64 >> unused }));
        Ok(())
    }

    fn bytes(&mut self, width: usize) -> Result<()> {
        let bytes = self.sized(width)?.to_vec();
        self.push(Value::Bytes(bytes));
        Ok(())
    }

    fn unicode(&mut self, width: usize) -> Result<()> {
        match std::str::from_utf8(self.sized(width)?) {
            Ok(text) => self.push(Value::Text(text.to_owned())),
            Err(_) => return broken("a text is not UTF-8"),
        }
        Ok(())
    }

    fn tuple(&mut self, count: usize) -> Result<()> {
        let mut all = (0..count).map(|_| self.pop()).collect::<Result<Vec<_>>>()?;
        all.reverse();
        self.push(Value::Tuple(all));
        Ok(())
    }

    fn extend_list(&mut self, items: Vec<Id>) -> Result<()> {
        let top = self.top()?;
        let Value::List(list) = &mut self.values[top] else { return broken("a list is missing") };
        list.extend(items);
        Ok(())
    }

    fn extend_dict(&mut self, items: &[Id]) -> Result<()> {
        let top = self.top()?;
        let Value::Dict(entries) = &mut self.values[top] else { return broken("a dictionary is missing") };
        let pairs = items.chunks_exact(2).map(|pair| (pair[0], pair[1]));
        entries.extend(pairs);
        Ok(())
    }

    fn put(&mut self, width: usize) -> Result<()> {
        let (place, top) = (self.number(width)?, self.top()?);
        self.memo.insert(place, top);
        Ok(())
    }

    fn get(&mut self, width: usize) -> Result<()> {
        let place = self.number(width)?;
        match self.memo.get(&place) {
            Some(id) => self.stack.push(*id),
            None => return broken("a value is referred to that was not kept"),
        }
        Ok(())
    }

    fn global(&mut self, name: String) -> Result<()> {
        if !KNOWN.contains(&name.as_str()) {
            return Err(Error::Foreign(name));
        }
        self.push(Value::Global(name));
        Ok(())
    }

    /// `_codecs.encode(text, "latin1")` is how Python 3 writes bytes for Python 2; anything else is kept as it is.
    fn reduce(&mut self) -> Result<()> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let Value::Global(name) = &self.values[function] else { return broken("a function is missing") };
        if name != "_codecs.encode" {
            self.push(Value::Made { function, arguments, state: None });
            return Ok(());
        }
        let Value::Tuple(all) = &self.values[arguments] else { return broken("arguments are missing") };
        let texts =
            all.iter().map(|id| if let Value::Text(text) = &self.values[*id] { text.as_str() } else { "" });
        let bytes = match texts.collect::<Vec<_>>().as_slice() {
            [text, "latin1" | "latin-1"] => {
                let left = self.left.checked_sub(text.len());
                self.left = left.map_or_else(|| broken("it encodes a text again and again"), Ok)?;
                text.chars().map(|c| u8::try_from(u32::from(c))).collect::<std::result::Result<Vec<u8>, _>>()
            }
            _ => return broken("a text is encoded in another way than latin1"),
        };
        match bytes {
            Ok(bytes) => self.push(Value::Bytes(bytes)),
            Err(_) => return broken("a text is not latin1"),
        }
        Ok(())
    }
}
