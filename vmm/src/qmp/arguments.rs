//! A command's arguments, checked as QEMU's input visitor checks them, with its messages.

use serde_json::{Map, Value};

use super::wire::Error;

/// The arguments that no one has taken yet. A verb takes what it knows, then calls
/// [`Arguments::finish`], which refuses the rest.
#[derive(Debug)]
pub(super) struct Arguments(Map<String, Value>);

impl Arguments {
    /// What came with a command.
    pub(super) fn new(arguments: Map<String, Value>) -> Self {
        Arguments(arguments)
    }

    /// A string that must be there.
    ///
    /// # Errors
    /// When it is missing or no string.
    pub(super) fn string(&mut self, name: &'static str) -> Result<String, Error> {
        match self.0.remove(name) {
            Some(Value::String(text)) => Ok(text),
            Some(_) => Err(Error::Type(name, "string")),
            None => Err(Error::Missing(name)),
        }
    }

    /// A boolean that may be left out, which means `false`.
    ///
    /// # Errors
    /// When it is there and no boolean.
    pub(super) fn flag(&mut self, name: &'static str) -> Result<bool, Error> {
        match self.0.remove(name) {
            Some(Value::Bool(flag)) => Ok(flag),
            Some(_) => Err(Error::Type(name, "boolean")),
            None => Ok(false),
        }
    }

    /// A list of strings that may be left out, which means an empty one.
    ///
    /// # Errors
    /// When it is there and no list, or one of its members is no string.
    pub(super) fn strings(&mut self, name: &'static str) -> Result<Vec<String>, Error> {
        let values = match self.0.remove(name) {
            Some(Value::Array(values)) => values,
            Some(_) => return Err(Error::Type(name, "array")),
            None => return Ok(Vec::new()),
        };
        let text = |value| match value {
            Value::String(text) => Ok(text),
            _ => Err(Error::Type(name, "string")),
        };
        values.into_iter().map(text).collect()
    }

    /// Ends the taking.
    ///
    /// # Errors
    /// When an argument is left that the verb does not have.
    pub(super) fn finish(self) -> Result<(), Error> {
        match self.0.into_iter().next() {
            Some((name, _)) => Err(Error::Unexpected(name)),
            None => Ok(()),
        }
    }
}
