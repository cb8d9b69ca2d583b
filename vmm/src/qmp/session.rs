//! One client's dialogue: negotiation first, then commands.

use std::os::fd::OwnedFd;

use serde_json::Value;

use super::arguments::Arguments;
use super::commands::{self, Backend, Context, QMP_CAPABILITIES};
use super::json;
use super::wire::{self, Command, Error};
use crate::migration::descriptors::Descriptors;
use crate::probes::{self, Guarded};

/// What a client has agreed on so far.
#[derive(Debug, Default)]
pub(super) struct Session {
    negotiated: bool,
    descriptors: Descriptors,
}

/// What is to be done about a message.
#[derive(Debug)]
pub(super) struct Reply {
    /// The answer, to be sent before anything else is done.
    pub line: Vec<u8>,
    /// The client has just finished negotiation: from now on it gets events.
    pub joined: bool,
    /// The client asked for the process to end.
    pub quit: bool,
}

impl Session {
    /// A descriptor came with the client's bytes.
    pub(super) fn pass(&mut self, fd: OwnedFd) {
        self.descriptors.pass(fd);
    }

    /// Answers one message.
    pub(super) fn answer(
        &mut self,
        backend: &dyn Backend,
        message: Result<Value, json::Error>,
    ) -> Reply {
        let before = self.negotiated;
        let mut descriptors = std::mem::take(&mut self.descriptors);
        let mut context = Context {
            backend,
            descriptors: &mut descriptors,
            quit: false,
        };
        let (id, result) = match message {
            Ok(message) => {
                let (id, command) = wire::parse(message);
                let result = command.and_then(|command| self.run(&mut context, command));
                (id, result)
            }
            Err(error) => (None, Err(error.into())),
        };
        let quit = context.quit;
        self.descriptors = descriptors;
        Reply {
            line: wire::answer(id, result),
            joined: self.negotiated && !before,
            quit,
        }
    }

    fn run(&mut self, context: &mut Context<'_>, command: Command) -> Result<Value, Error> {
        let negotiates = command.name == QMP_CAPABILITIES;
        if !self.negotiated && !negotiates {
            return Err(Error::Negotiate);
        }
        if self.negotiated && negotiates {
            return Err(Error::Negotiated);
        }
        let verb = commands::find(command.name)?;
        let arguments = Arguments::new(command.arguments);
        let result = probes::qmp_command(verb.name).run(|_| (verb.run)(context, arguments));
        self.negotiated |= result.is_ok();
        result
    }
}
