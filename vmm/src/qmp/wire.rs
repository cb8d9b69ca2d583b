//! What goes over the socket: greeting, requests, answers, errors and events, in QEMU's words
//! (`docs/interop/qmp-spec.rst`, `qapi/qmp-dispatch.c`).

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Map, Serializer, Value, json};

use super::json;
use crate::probes::Errno;
use crate::runstate::Event;
use crate::{control, migration};

/// The QEMU release whose QMP this is: clients decide by it which shapes to expect.
const QEMU: [u32; 3] = [10, 0, 0];

/// A QMP error. Where QEMU has the same error, the text is QEMU's.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bytes are no JSON.
    #[error(transparent)]
    Json(#[from] json::Error),
    /// JSON, but not an object.
    #[error("QMP input must be a JSON object")]
    NotAnObject,
    /// No command.
    #[error("QMP input lacks member 'execute'")]
    NoExecute,
    /// `execute` or `arguments` has the wrong type.
    #[error("QMP input member '{0}' must be {1}")]
    MemberType(&'static str, &'static str),
    /// A member that requests don't have.
    #[error("QMP input member '{0}' is unexpected")]
    UnexpectedMember(String),
    /// No such verb.
    #[error("The command {0} has not been found")]
    NotFound(String),
    /// A command before `qmp_capabilities`.
    #[error("Expecting capabilities negotiation with 'qmp_capabilities'")]
    Negotiate,
    /// A second `qmp_capabilities`.
    #[error("Capabilities negotiation is already complete, command ignored")]
    Negotiated,
    /// A capability that the greeting did not offer.
    #[error("Capability {0} not available")]
    NoCapability(String),
    /// An argument that must be there is not.
    #[error("Parameter '{0}' is missing")]
    Missing(String),
    /// An argument that the verb does not have.
    #[error("Parameter '{0}' is unexpected")]
    Unexpected(String),
    /// An argument of the wrong type.
    #[error("Invalid parameter type for '{0}', expected: {1}")]
    Type(String, &'static str),
    /// A number of the wrong kind, or out of range.
    #[error("Parameter '{0}' expects {1}")]
    Expects(&'static str, &'static str),
    /// A value that is none of an enumeration's.
    #[error("Parameter '{0}' does not accept value '{1}'")]
    Value(&'static str, String),
    /// A parameter of migrations out of its range.
    #[error(transparent)]
    Range(#[from] migration::settings::OutOfRange),
    /// A descriptor that a client has not passed, or that can't be named.
    #[error(transparent)]
    Descriptor(#[from] migration::descriptors::Error),
    /// Credentials that can't be had or are not there.
    #[error(transparent)]
    Credentials(#[from] migration::credentials::Error),
    /// What was asked for can't be done in the state that the VM is in.
    #[error("{0}")]
    State(&'static str),
    /// The power button could not be pressed.
    #[error("the power button can't be pressed: {0}")]
    Powerdown(#[source] std::io::Error),
    /// The VM could not be stopped, started or reset.
    #[error(transparent)]
    Control(#[from] control::Error),
    /// The migration could not be begun.
    #[error(transparent)]
    Migration(#[from] migration::Error),
}

impl Error {
    /// QEMU's `QapiErrorClass`.
    fn class(&self) -> &'static str {
        match self {
            Error::NotFound(_) | Error::Negotiate | Error::Negotiated => "CommandNotFound",
            _ => "GenericError",
        }
    }

    /// The error and all its causes in one line.
    fn text(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}

impl Errno for Error {
    fn errno(&self) -> i32 {
        match self {
            Error::NotFound(_) => libc::ENOSYS,
            Error::NoCapability(_) => libc::ENOTSUP,
            Error::Negotiate | Error::Negotiated | Error::State(_) => libc::EBUSY,
            Error::Control(error) => error.errno(),
            Error::Migration(error) => error.errno(),
            Error::Descriptor(error) => error.errno(),
            Error::Credentials(error) => error.errno(),
            _ => libc::EINVAL,
        }
    }
}

/// A command as a client sends it, before anyone has looked whether it exists.
#[derive(Debug)]
pub(super) struct Command {
    /// The verb.
    pub name: String,
    /// Its arguments; none is the same as an empty object.
    pub arguments: Map<String, Value>,
}

/// Takes a message apart into its `id`, which every answer repeats, and the command.
pub(super) fn parse(message: Value) -> (Option<Value>, Result<Command, Error>) {
    let Value::Object(mut members) = message else {
        return (None, Err(Error::NotAnObject));
    };
    (members.remove("id"), command(members))
}

fn command(mut members: Map<String, Value>) -> Result<Command, Error> {
    let name = match members.remove("execute") {
        Some(Value::String(name)) => Some(name),
        Some(_) => return Err(Error::MemberType("execute", "a string")),
        None => None,
    };
    let arguments = match members.remove("arguments") {
        Some(Value::Object(arguments)) => arguments,
        Some(_) => return Err(Error::MemberType("arguments", "an object")),
        None => Map::new(),
    };
    match (members.into_iter().next(), name) {
        (Some((member, _)), _) => Err(Error::UnexpectedMember(member)),
        (None, Some(name)) => Ok(Command { name, arguments }),
        (None, None) => Err(Error::NoExecute),
    }
}

/// What a client is greeted with. Out-of-band execution is the one capability that QEMU has, and
/// it is not offered here.
pub(super) fn greeting() -> Vec<u8> {
    line(&json!({ "QMP": { "version": version(), "capabilities": [] } }))
}

/// The `VersionInfo` of the greeting and of `query-version`.
pub(super) fn version() -> Value {
    let [major, minor, micro] = QEMU;
    json!({
        "qemu": { "major": major, "minor": minor, "micro": micro },
        "package": concat!("blackout-vmm ", env!("CARGO_PKG_VERSION")),
    })
}

/// The answer to one message.
pub(super) fn answer(id: Option<Value>, result: Result<Value, Error>) -> Vec<u8> {
    #[derive(Serialize)]
    struct Answer {
        #[serde(rename = "return", skip_serializing_if = "Option::is_none")]
        result: Option<Value>,
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<ErrorBody>,
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<Value>,
    }
    #[derive(Serialize)]
    struct ErrorBody {
        class: &'static str,
        desc: String,
    }
    let (result, error) = match result {
        Ok(value) => (Some(value), None),
        Err(error) => (
            None,
            Some(ErrorBody {
                class: error.class(),
                desc: error.text(),
            }),
        ),
    };
    line(&Answer { result, error, id })
}

/// An event that happened at `at`.
pub(super) fn event(at: SystemTime, event: &Event) -> Vec<u8> {
    #[derive(Serialize)]
    struct Message {
        timestamp: Timestamp,
        event: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        data: Option<Value>,
    }
    #[derive(Serialize)]
    struct Timestamp {
        seconds: u64,
        microseconds: u32,
    }
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (event, data) = match event {
        Event::Stop => ("STOP", None),
        Event::Resume => ("RESUME", None),
        Event::Migration(status) => ("MIGRATION", Some(json!({ "status": status }))),
        Event::Reset { guest, reason } => ("RESET", Some(cause(*guest, reason))),
        Event::Powerdown => ("POWERDOWN", None),
        Event::Shutdown { guest, reason } => ("SHUTDOWN", Some(cause(*guest, reason))),
    };
    line(&Message {
        timestamp: Timestamp {
            seconds: since.as_secs(),
            microseconds: since.subsec_micros(),
        },
        event,
        data,
    })
}

/// Who ended or reset the machine, and why.
fn cause(guest: bool, reason: &str) -> Value {
    json!({ "guest": guest, "reason": reason })
}

/// One line, spaced as QEMU spaces it: people and scripts look for `"return": {}`.
fn line(message: &impl Serialize) -> Vec<u8> {
    let mut line = Vec::new();
    message
        .serialize(&mut Serializer::with_formatter(&mut line, QemuSpacing))
        .expect("memory can be written to, and every key is a string");
    line.extend_from_slice(b"\r\n");
    line
}

struct QemuSpacing;

impl serde_json::ser::Formatter for QemuSpacing {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}
