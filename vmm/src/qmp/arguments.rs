//! A command's arguments, checked as QEMU's input visitor checks them, with its messages.

use serde_json::{Map, Value};

use super::wire::Error;

/// The arguments that no one has taken yet. A verb takes what it knows, then calls
/// [`Arguments::finish`], which refuses the rest.
#[derive(Debug)]
pub(super) struct Arguments {
    members: Map<String, Value>,
    /// What stands before a member's name in errors: where these are members of, and a dot.
    path: String,
}

impl Arguments {
    /// What came with a command.
    pub(super) fn new(arguments: Map<String, Value>) -> Self {
        Arguments {
            members: arguments,
            path: String::new(),
        }
    }

    /// A string that must be there.
    ///
    /// # Errors
    /// When it is missing or no string.
    pub(super) fn string(&mut self, name: &'static str) -> Result<String, Error> {
        match self.members.remove(name) {
            Some(Value::String(text)) => Ok(text),
            Some(_) => Err(self.wrong(name, "string")),
            None => Err(self.missing(name)),
        }
    }

    /// A string that may be left out.
    ///
    /// # Errors
    /// When it is there and no string.
    pub(super) fn optional_string(&mut self, name: &'static str) -> Result<Option<String>, Error> {
        match self.members.contains_key(name) {
            true => self.string(name).map(Some),
            false => Ok(None),
        }
    }

    /// A string that may be left out, or `null`, which means an empty one.
    ///
    /// # Errors
    /// When it is something else.
    pub(super) fn string_or_null(&mut self, name: &'static str) -> Result<Option<String>, Error> {
        match self.members.remove(name) {
            None => Ok(None),
            Some(Value::Null) => Ok(Some(String::new())),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(name, "StrOrNull")),
        }
    }

    /// A boolean that may be left out.
    ///
    /// # Errors
    /// When it is there and no boolean.
    pub(super) fn optional_flag(&mut self, name: &'static str) -> Result<Option<bool>, Error> {
        match self.members.contains_key(name) {
            true => self.flag(name).map(Some),
            false => Ok(None),
        }
    }

    /// A boolean that may be left out, which means `false`.
    ///
    /// # Errors
    /// When it is there and no boolean.
    pub(super) fn flag(&mut self, name: &'static str) -> Result<bool, Error> {
        match self.members.remove(name) {
            Some(Value::Bool(flag)) => Ok(flag),
            Some(_) => Err(self.wrong(name, "boolean")),
            None => Ok(false),
        }
    }

    /// A boolean that must be there.
    ///
    /// # Errors
    /// When it is missing or no boolean.
    pub(super) fn boolean(&mut self, name: &'static str) -> Result<bool, Error> {
        if !self.members.contains_key(name) {
            return Err(self.missing(name));
        }
        self.flag(name)
    }

    /// A number that may be left out. As with QEMU a negative one is taken for its two's complement.
    ///
    /// # Errors
    /// When it is there and no 64-bit integer.
    pub(super) fn number(&mut self, name: &'static str) -> Result<Option<u64>, Error> {
        let number = |value: Value| {
            let signed = || value.as_i64().map(i64::cast_unsigned);
            value.as_u64().or_else(signed)
        };
        match self.members.remove(name) {
            None => Ok(None),
            Some(value) => match number(value) {
                None => Err(Error::Expects(name, "uint64")),
                number => Ok(number),
            },
        }
    }

    /// A list of objects that must be there.
    ///
    /// # Errors
    /// When it is missing or no list, or one of its members is no object.
    pub(super) fn objects(&mut self, name: &'static str) -> Result<Vec<Arguments>, Error> {
        let values = match self.members.remove(name) {
            Some(Value::Array(values)) => values,
            Some(_) => return Err(self.wrong(name, "array")),
            None => return Err(self.missing(name)),
        };
        let object = |(index, value)| {
            let path = format!("{}{name}[{index}]", self.path);
            match value {
                Value::Object(members) => Ok(Arguments {
                    members,
                    path: path + ".",
                }),
                _ => Err(Error::Type(path, "object")),
            }
        };
        values.into_iter().enumerate().map(object).collect()
    }

    /// A list of strings that may be left out, which means an empty one.
    ///
    /// # Errors
    /// When it is there and no list, or one of its members is no string.
    pub(super) fn strings(&mut self, name: &'static str) -> Result<Vec<String>, Error> {
        let values = match self.members.remove(name) {
            Some(Value::Array(values)) => values,
            Some(_) => return Err(self.wrong(name, "array")),
            None => return Ok(Vec::new()),
        };
        let text = |value| match value {
            Value::String(text) => Ok(text),
            _ => Err(self.wrong(name, "string")),
        };
        values.into_iter().map(text).collect()
    }

    /// Ends the taking.
    ///
    /// # Errors
    /// When an argument is left that the verb does not have.
    pub(super) fn finish(self) -> Result<(), Error> {
        match self.members.into_iter().next() {
            Some((name, _)) => Err(Error::Unexpected(self.path + &name)),
            None => Ok(()),
        }
    }

    fn missing(&self, name: &str) -> Error {
        Error::Missing(format!("{}{name}", self.path))
    }

    fn wrong(&self, name: &str, expected: &'static str) -> Error {
        Error::Type(format!("{}{name}", self.path), expected)
    }
}
