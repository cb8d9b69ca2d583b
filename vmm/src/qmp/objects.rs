//! `[1]` The verbs about objects, of which there is one kind: TLS credentials.

use std::path::PathBuf;

use super::arguments::Arguments;
use super::commands::{Answer, Context, done};
use super::wire::Error;
use crate::migration::credentials::{Endpoint, Options};

/// QEMU's name of the kind.
const TLS_CREDS: &str = "tls-creds-x509";

pub(super) fn object_add(context: &mut Context<'_>, mut arguments: Arguments) -> Answer {
    let kind = arguments.string("qom-type")?;
    if kind != TLS_CREDS {
        return Err(Error::Value("qom-type", kind));
    }
    let id = arguments.string("id")?;
    let dir = arguments.optional_string("dir")?;
    let endpoint = arguments.optional_string("endpoint")?;
    let verified = arguments.optional_flag("verify-peer")?;
    arguments.finish()?;
    let endpoint = match endpoint {
        None => Endpoint::Client,
        Some(name) => match Endpoint::from_name(&name) {
            None => return Err(Error::Value("endpoint", name)),
            Some(endpoint) => endpoint,
        },
    };
    if !id.starts_with(|c: char| c.is_ascii_alphabetic()) {
        return Err(Error::Expects("id", "an identifier"));
    }
    let Some(dir) = dir.map(PathBuf::from) else {
        return Err(Error::State("Missing 'dir' property value"));
    };
    if verified == Some(false) {
        return Err(Error::State(
            "'verify-peer' can't be off: both sides of a migration prove who they are",
        ));
    }
    let keyring = context.backend.settings().keyring();
    keyring.add(Options { id, dir, endpoint })?;
    done()
}

pub(super) fn object_del(context: &mut Context<'_>, mut arguments: Arguments) -> Answer {
    let id = arguments.string("id")?;
    arguments.finish()?;
    context.backend.settings().keyring().remove(&id)?;
    done()
}
