//! The part of Python's pickle machine that `torch.save` uses (protocols 2 to 5). Objects are collected in a list
//! and refer to each other by position; calls are recognised by name or recorded as opaque, never made.
//! Format: CPython's Lib/pickletools.py.

use std::collections::HashMap;

/// An object of the pickle. Numbers of type usize are positions in [`Graph::objects`].
#[derive(Debug)]
pub enum Object {
    None,
    Bool(bool),
    Int(i64),
    /// A number of more than 64 bits.
    LongInt,
    Float(f64),
    Str(String),
    Bytes,
    Tuple(Vec<usize>),
    /// A list or a set.
    List(Vec<usize>),
    Dict(Vec<(usize, usize)>),
    /// A class or function, as module.name.
    Global(String),
    Storage {
        class: String,
        key: String,
        numel: i64,
    },
    Tensor {
        storage: usize,
        offset: i64,
        size: Vec<i64>,
        stride: Vec<i64>,
    },
    /// An object of a class that is not known here.
    Instance {
        class: String,
        state: Option<usize>,
    },
}

/// All objects and the position of the outermost.
pub struct Graph {
    pub objects: Vec<Object>,
    pub root: usize,
}

/// Runs the pickle.
pub fn parse(bytes: &[u8]) -> Result<Graph, String> {
    let mut machine = Machine {
        bytes,
        at: 0,
        objects: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
    };
    loop {
        let start = machine.at;
        let opcode = machine.byte()?;
        if opcode == b'.' {
            let root = machine.pop()?;
            return Ok(Graph { objects: machine.objects, root });
        }
        machine.run(opcode).map_err(|e| format!("data.pkl, byte {start}, opcode {opcode:#04x}: {e}"))?;
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    objects: Vec<Object>,
    stack: Vec<usize>,
    /// Heights of the stack at the open marks.
    marks: Vec<usize>,
    memo: HashMap<u64, usize>,
}

type Step = Result<(), String>;

impl<'a> Machine<'a> {
    // ---- bytes -----------------------------------------------------------------------------------------

    fn take(&mut self, n: u64) -> Result<&'a [u8], String> {
        let rest = &self.bytes[self.at..];
        let n = usize::try_from(n).ok().filter(|&n| n <= rest.len()).ok_or("the pickle is cut off")?;
        self.at += n;
        Ok(&rest[..n])
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.take(1)?[0])
    }

    /// A little-endian number of `n` bytes, at most 8.
    fn uint(&mut self, n: usize) -> Result<u64, String> {
        Ok(self.take(n as u64)?.iter().rev().fold(0, |x, &b| x << 8 | u64::from(b)))
    }

    fn line(&mut self) -> Result<String, String> {
        let rest = &self.bytes[self.at..];
        let n = rest.iter().position(|&b| b == b'\n').ok_or("the pickle is cut off")?;
        self.at += n + 1;
        Ok(String::from_utf8_lossy(&rest[..n]).into_owned())
    }

    fn text(&mut self, length_bytes: usize) -> Step {
        let n = self.uint(length_bytes)?;
        let text = String::from_utf8_lossy(self.take(n)?).into_owned();
        self.push(Object::Str(text))
    }

    fn skip(&mut self, length_bytes: usize) -> Step {
        let n = self.uint(length_bytes)?;
        self.take(n)?;
        self.push(Object::Bytes)
    }

    fn long(&mut self, length_bytes: usize) -> Step {
        let n = self.uint(length_bytes)?;
        let bytes = self.take(n)?;
        if bytes.len() > 8 {
            return self.push(Object::LongInt);
        }
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let mut full = [if negative { 0xff } else { 0 }; 8];
        full[..bytes.len()].copy_from_slice(bytes);
        self.push(Object::Int(i64::from_le_bytes(full)))
    }

    // ---- stack -----------------------------------------------------------------------------------------

    fn push(&mut self, object: Object) -> Step {
        self.objects.push(object);
        self.stack.push(self.objects.len() - 1);
        Ok(())
    }

    fn pop(&mut self) -> Result<usize, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("the stack is empty".into());
        }
        self.stack.pop().ok_or_else(|| "the stack is empty".into())
    }

    fn top(&self) -> Result<usize, String> {
        self.stack.last().copied().ok_or_else(|| "the stack is empty".into())
    }

    /// Everything above the last mark.
    fn pop_mark(&mut self) -> Result<Vec<usize>, String> {
        let mark = self.marks.pop().ok_or("there is no mark")?;
        Ok(self.stack.split_off(mark))
    }

    fn tuple(&mut self, n: usize) -> Step {
        let mut items = Vec::with_capacity(n);
        for _ in 0..n {
            items.push(self.pop()?);
        }
        items.reverse();
        self.push(Object::Tuple(items))
    }

    fn remember(&mut self, key: u64) -> Step {
        self.memo.insert(key, self.top()?);
        Ok(())
    }

    fn recall(&mut self, key: u64) -> Step {
        let object = *self.memo.get(&key).ok_or_else(|| format!("nothing was stored under {key}"))?;
        self.stack.push(object);
        Ok(())
    }

    // ---- opcodes ---------------------------------------------------------------------------------------

    fn run(&mut self, opcode: u8) -> Step {
        match opcode {
            0x80 => self.byte().and_then(|v| if v <= 5 { Ok(()) } else { Err(format!("protocol {v}")) }),
            0x95 => self.take(8).map(|_| ()),
            b'(' => {
                self.marks.push(self.stack.len());
                Ok(())
            }
            b'0' => self.pop().map(|_| ()),
            b'1' => self.pop_mark().map(|_| ()),
            b'2' => self.top().map(|top| self.stack.push(top)),
            b'N' => self.push(Object::None),
            0x88 => self.push(Object::Bool(true)),
            0x89 => self.push(Object::Bool(false)),
            b'J' => self.uint(4).and_then(|x| self.push(Object::Int(i64::from(x as u32 as i32)))),
            b'K' => self.uint(1).and_then(|x| self.push(Object::Int(x as i64))),
            b'M' => self.uint(2).and_then(|x| self.push(Object::Int(x as i64))),
            0x8a => self.long(1),
            0x8b => self.long(4),
            b'G' => self.uint(8).and_then(|x| self.push(Object::Float(f64::from_bits(x.swap_bytes())))),
            b'X' => self.text(4),
            0x8c => self.text(1),
            0x8d => self.text(8),
            b'U' => self.text(1),
            b'T' => self.text(4),
            b'C' => self.skip(1),
            b'B' => self.skip(4),
            0x8e | 0x96 => self.skip(8),
            b')' => self.push(Object::Tuple(Vec::new())),
            b'q' => self.uint(1).and_then(|key| self.remember(key)),
            b'r' => self.uint(4).and_then(|key| self.remember(key)),
            0x94 => self.remember(self.memo.len() as u64),
            b'h' => self.uint(1).and_then(|key| self.recall(key)),
            b'j' => self.uint(4).and_then(|key| self.recall(key)),
            0x85..=0x87 => self.tuple(usize::from(opcode - 0x84)),
            b't' => self.pop_mark().and_then(|items| self.push(Object::Tuple(items))),
            _ => self.run_containers(opcode),
        }
    }

    fn run_containers(&mut self, opcode: u8) -> Step {
        match opcode {
            b']' | 0x8f => self.push(Object::List(Vec::new())),
            b'}' => self.push(Object::Dict(Vec::new())),
            b'l' | 0x91 => self.pop_mark().and_then(|items| self.push(Object::List(items))),
            b'd' => {
                let items = self.pop_mark()?;
                self.push(Object::Dict(Vec::new()))?;
                self.set_items(&items)
            }
            b'a' => {
                let item = self.pop()?;
                self.append(&[item])
            }
            b'e' | 0x90 => self.pop_mark().and_then(|items| self.append(&items)),
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set_items(&[key, value])
            }
            b'u' => self.pop_mark().and_then(|items| self.set_items(&items)),
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Object::Global(format!("{module}.{name}")))
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (&self.objects[module], &self.objects[name]) {
                    (Object::Str(module), Object::Str(name)) => {
                        let name = format!("{module}.{name}");
                        self.push(Object::Global(name))
                    }
                    _ => Err("a class whose name is no text".into()),
                }
            }
            b'R' | 0x81 => {
                let (args, callee) = (self.pop()?, self.pop()?);
                self.call(callee, args)
            }
            0x92 => {
                let (_, args, callee) = (self.pop()?, self.pop()?, self.pop()?);
                self.call(callee, args)
            }
            b'b' => self.build(),
            b'Q' => self.persistent(),
            _ => Err("not part of what torch.save writes".into()),
        }
    }

    fn append(&mut self, items: &[usize]) -> Step {
        let top = self.top()?;
        match &mut self.objects[top] {
            Object::List(list) => list.extend_from_slice(items),
            Object::Instance { .. } => {}
            _ => return Err("items for what is no list".into()),
        }
        Ok(())
    }

    fn set_items(&mut self, items: &[usize]) -> Step {
        let top = self.top()?;
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err("a key without a value".into());
        }
        match &mut self.objects[top] {
            Object::Dict(entries) => entries.extend(pairs.iter().map(|&[key, value]| (key, value))),
            Object::Instance { .. } => {}
            _ => return Err("entries for what is no dictionary".into()),
        }
        Ok(())
    }

    /// Sets an object's state; that of an OrderedDict (`_metadata`) or a tensor is of no use here.
    fn build(&mut self) -> Step {
        let state = self.pop()?;
        let top = self.top()?;
        if let Object::Instance { state: slot, .. } = &mut self.objects[top] {
            *slot = Some(state);
        }
        Ok(())
    }

    // ---- what calls mean -------------------------------------------------------------------------------

    fn args(&self, at: usize) -> Result<&[usize], String> {
        match &self.objects[at] {
            Object::Tuple(items) => Ok(items),
            _ => Err("arguments that are no tuple".into()),
        }
    }

    fn call(&mut self, callee: usize, args: usize) -> Step {
        let Object::Global(name) = &self.objects[callee] else {
            return self.push(Object::Instance { class: "unknown".into(), state: None });
        };
        let args = self.args(args)?;
        match name.as_str() {
            "collections.OrderedDict" | "collections.defaultdict" | "builtins.dict" | "__builtin__.dict" => {
                let entries = args.first().map_or_else(Vec::new, |&list| self.pairs(list));
                self.push(Object::Dict(entries))
            }
            "torch._utils._rebuild_tensor_v2" => {
                let tensor = self.tensor(args)?;
                self.push(tensor)
            }
            "torch._utils._rebuild_parameter"
            | "torch._utils._rebuild_parameter_with_state"
            | "torch.Size"
            | "builtins.set"
            | "__builtin__.set" => match args.first() {
                Some(&first) => {
                    self.stack.push(first);
                    Ok(())
                }
                None => self.push(Object::Tuple(Vec::new())),
            },
            name => {
                let class = name.to_owned();
                self.push(Object::Instance { class, state: None })
            }
        }
    }

    /// The entries of a dictionary that is made from a list of pairs.
    fn pairs(&self, list: usize) -> Vec<(usize, usize)> {
        let Object::List(items) = &self.objects[list] else { return Vec::new() };
        let pair = |&item: &usize| match &self.objects[item] {
            Object::Tuple(pair) | Object::List(pair) => Some((*pair.first()?, *pair.get(1)?)),
            _ => None,
        };
        items.iter().filter_map(pair).collect()
    }

    /// `_rebuild_tensor_v2(storage, offset, size, stride, ..)`
    fn tensor(&self, args: &[usize]) -> Result<Object, String> {
        let &[storage, offset, size, stride, ..] = args else {
            return Err("a tensor of fewer than four arguments".into());
        };
        let numbers =
            |at: usize| -> Result<Vec<i64>, String> { self.args(at)?.iter().map(|&i| self.int(i)).collect() };
        let (size, stride) = (numbers(size)?, numbers(stride)?);
        Ok(Object::Tensor { storage, offset: self.int(offset)?, size, stride })
    }

    fn int(&self, at: usize) -> Result<i64, String> {
        match self.objects[at] {
            Object::Int(i) => Ok(i),
            _ => Err("no whole number where one belongs".into()),
        }
    }

    /// `('storage', class, key, device, number of elements)`
    fn persistent(&mut self) -> Step {
        let id = self.pop()?;
        let &[_, class, key, _, numel] = self.args(id)? else {
            return Err("a storage is named by other than five things".into());
        };
        match (&self.objects[class], &self.objects[key]) {
            (Object::Global(class), Object::Str(key)) => {
                let storage =
                    Object::Storage { class: class.clone(), key: key.clone(), numel: self.int(numel)? };
                self.push(storage)
            }
            _ => Err("a storage without class or key".into()),
        }
    }
}
