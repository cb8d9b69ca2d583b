//! Cuts a byte stream into JSON messages, where QEMU's parser cuts it.
//!
//! QMP has no frames: several messages may share a line, and one may span many. A message ends
//! where its brackets balance; at the top level a lone word, number or string is a message too, if
//! a useless one. The client is hostile: a message is bounded in size and depth, and after anything
//! that can't be JSON the cutter starts afresh with the next byte, as QEMU's does
//! (`qobject/json-lexer.c`, `json-streamer.c`).

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// The longest message, in bytes. QEMU allows 64 MiB; no verb here needs a hundredth of this.
pub(super) const MAX_MESSAGE: usize = 64 * 1024;
/// How deep brackets may nest. QEMU allows 1024.
pub(super) const MAX_DEPTH: usize = 64;

/// Why bytes are no message.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A byte that no JSON text has in this place.
    #[error("JSON parse error, stray '{}'", .0.escape_ascii())]
    Stray(u8),
    /// Longer than [`MAX_MESSAGE`].
    #[error("JSON message is longer than {MAX_MESSAGE} bytes")]
    TooLong,
    /// Deeper than [`MAX_DEPTH`].
    #[error("JSON nesting depth limit exceeded")]
    TooDeep,
    /// Not JSON.
    #[error("JSON parse error")]
    Syntax(#[source] serde_json::Error),
}

/// Cuts messages out of what [`Framer::feed`] is given.
#[derive(Debug, Default)]
pub(super) struct Framer {
    message: Vec<u8>,
    token: Token,
    open: usize,
    deepest: usize,
    too_long: bool,
}

/// Inside what the next byte lies.
#[derive(Clone, Copy, Debug, Default)]
enum Token {
    #[default]
    None,
    /// A number or a keyword.
    Word,
    String {
        quote: u8,
        escaped: bool,
    },
}

impl Framer {
    /// Takes the next bytes of the stream; returns the messages that end in them, each parsed, or
    /// the reason why it can't be.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Vec<Result<Value, Error>> {
        let mut messages = Vec::new();
        for &byte in bytes {
            self.step(byte, &mut messages);
        }
        messages
    }

    fn step(&mut self, byte: u8, messages: &mut Vec<Result<Value, Error>>) {
        match self.token {
            Token::String { quote, escaped } => return self.string(byte, quote, escaped, messages),
            Token::Word if is_word(byte) => return self.push(byte),
            Token::Word => self.end_token(messages),
            Token::None => {}
        }
        match byte {
            b' ' | b'\t' | b'\r' | b'\n' if self.open == 0 => {}
            b' ' | b'\t' | b'\r' | b'\n' => self.push(byte),
            b'"' | b'\'' => {
                self.push(b'"');
                self.token = Token::String {
                    quote: byte,
                    escaped: false,
                };
            }
            b'{' | b'[' => {
                self.open += 1;
                self.deepest = self.deepest.max(self.open);
                self.push(byte);
            }
            b'}' | b']' => {
                self.open = self.open.saturating_sub(1);
                self.push(byte);
                self.end_token(messages);
            }
            b',' | b':' => {
                self.push(byte);
                self.end_token(messages);
            }
            _ if is_word(byte) => {
                self.token = Token::Word;
                self.push(byte);
            }
            _ => self.stray(byte, messages),
        }
    }

    /// A byte inside a string. QEMU also takes strings in single quotes; they become JSON's here.
    fn string(
        &mut self,
        byte: u8,
        quote: u8,
        escaped: bool,
        messages: &mut Vec<Result<Value, Error>>,
    ) {
        let mut next_escaped = false;
        match byte {
            // 0xff is what a client sends to get the parser out of whatever it is in.
            ..0x20 | 0xfe.. => return self.stray(byte, messages),
            b'\'' if escaped => self.push(byte),
            _ if escaped => {
                self.push(b'\\');
                self.push(byte);
            }
            b'\\' => next_escaped = true,
            _ if byte == quote => {
                self.push(b'"');
                return self.end_token(messages);
            }
            b'"' => {
                self.push(b'\\');
                self.push(b'"');
            }
            _ => self.push(byte),
        }
        self.token = Token::String {
            quote,
            escaped: next_escaped,
        };
    }

    fn push(&mut self, byte: u8) {
        if self.message.len() < MAX_MESSAGE {
            self.message.push(byte);
        } else {
            self.too_long = true;
        }
    }

    /// The token ends here, and at the top level the message does, too.
    fn end_token(&mut self, messages: &mut Vec<Result<Value, Error>>) {
        self.token = Token::None;
        if self.open > 0 {
            return;
        }
        let whole = std::mem::take(self);
        messages.push(if whole.too_long {
            Err(Error::TooLong)
        } else if whole.deepest > MAX_DEPTH {
            Err(Error::TooDeep)
        } else {
            serde_json::from_slice(&whole.message)
                .map(|Unique(value)| value)
                .map_err(Error::Syntax)
        });
    }

    fn stray(&mut self, byte: u8, messages: &mut Vec<Result<Value, Error>>) {
        *self = Framer::default();
        messages.push(Err(Error::Stray(byte)));
    }
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.' | b'_')
}

/// A JSON value in which no object has a key twice: which of two `uri`s is meant can't be known.
struct Unique(Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueVisitor).map(Unique)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Unique(value)) = seq.next_element()? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut members = Map::new();
        while let Some((key, Unique(value))) = map.next_entry::<String, _>()? {
            if members.insert(key, value).is_some() {
                return Err(A::Error::custom("duplicate key"));
            }
        }
        Ok(Value::Object(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `input` byte by byte; a message shows as its JSON, an error as its text.
    fn cut(input: &[u8]) -> Vec<String> {
        let mut framer = Framer::default();
        let messages = input
            .iter()
            .flat_map(|byte| framer.feed(std::slice::from_ref(byte)));
        messages
            .map(|message| match message {
                Ok(value) => value.to_string(),
                Err(Error::Syntax(_)) => "syntax".to_owned(),
                Err(error) => error.to_string(),
            })
            .collect()
    }

    #[test]
    fn messages_are_cut_where_qemu_cuts_them() {
        const SYNTAX: &str = "syntax";
        let rows: &[(&[u8], &[&str])] = &[
            (b"{}{}", &["{}", "{}"]),
            (b"{\"a\":\n[1,\n\n2]\n}", &[r#"{"a":[1,2]}"#]),
            (b"{'a':'it\\'s \"b\"'}", &[r#"{"a":"it's \"b\""}"#]),
            (b"{\"a\":\"}{\\\"\"}", &[r#"{"a":"}{\""}"#]),
            (br#"{"a":"b\u0063\\"}"#, &[r#"{"a":"bc\\"}"#]),
            (b"{\"a\":1", &[]),
            (b"} 5\n", &[SYNTAX, "5"]),
            (b"{]", &[SYNTAX]),
            (b"{]}", &[SYNTAX, SYNTAX]),
            (b"xyz {}", &[SYNTAX, "{}"]),
            (b"\"x\" , []", &[r#""x""#, SYNTAX, "[]"]),
            (b"{\"a\":1 \"b\":2}", &[SYNTAX]),
            (b"{\"a\":{\"b\":1,\"b\":2}}", &[SYNTAX]),
            (b"{5:1}", &[SYNTAX]),
            (b"[1e400]", &[SYNTAX]),
            (b"{\"\xc3\x28\":1}", &[SYNTAX]),
            (b"\x01{}", &["JSON parse error, stray '\\x01'", "{}"]),
            (b"{\"a\":\"b\n{}", &["JSON parse error, stray '\\n'", "{}"]),
            (
                b"{\"a\":\"b\xff{}",
                &["JSON parse error, stray '\\xff'", "{}"],
            ),
            (b"{\"a\": $ {}", &["JSON parse error, stray '$'", "{}"]),
        ];
        for (input, messages) in rows {
            assert_eq!(&cut(input), messages, "{}", input.escape_ascii());
        }
    }

    #[test]
    fn size_and_depth_are_bounded_and_the_next_message_is_read() {
        let long = format!("[\"{}\"]{{}}", "x".repeat(MAX_MESSAGE));
        assert_eq!(
            cut(long.as_bytes()),
            ["JSON message is longer than 65536 bytes", "{}"]
        );
        let just = format!("[\"{}\"]", "x".repeat(MAX_MESSAGE - 4));
        assert_eq!(cut(just.as_bytes()), [just.as_str()]);
        for (depth, fits) in [(MAX_DEPTH, true), (MAX_DEPTH + 1, false), (1 << 20, false)] {
            let deep = format!("{}{}", "[".repeat(depth), "]".repeat(depth));
            let messages = cut(deep.as_bytes());
            assert_eq!(messages.len(), 1);
            assert_eq!(messages[0] == deep, fits, "depth {depth}");
        }
    }
}
