//! `[1]` The verbs about what a migration is to be like, and the one that lets it go on.

use serde_json::{Map, Value, json};

use super::arguments::Arguments;
use super::commands::{Answer, Context, done};
use super::wire::Error;
use crate::migration::settings::{Capability, Mode, Parameter, Text, TimeoutAction};
use crate::migration::status::MigrationStatus;

pub(super) fn query_migrate_parameters(context: &mut Context<'_>, arguments: Arguments) -> Answer {
    arguments.finish()?;
    let settings = context.backend.settings();
    let all = Parameter::ALL.iter();
    let values = all.map(|&p| (p.name().to_owned(), json!(settings.parameter(p))));
    let mut values: Map<_, _> = values.collect();
    for text in Text::ALL {
        values.insert(text.name().to_owned(), json!(settings.text(text)));
    }
    // QEMUs before 8.2 have no modes and do not name the only one: neither does this, nor what no QEMU has,
    // before it is set, so that their clients find what they know.
    let timeout = Parameter::MigrationTimeout;
    if settings.parameter(timeout) == 0 {
        values.remove(timeout.name());
    } else {
        let action = settings.timeout_action();
        values.insert("timeout-action".to_owned(), json!(action.name()));
    }
    if settings.mode() != Mode::Normal {
        values.insert("mode".to_owned(), json!(settings.mode().name()));
    }
    Ok(Value::Object(values))
}

/// Sets those that are named, also of a migration that is under way.
pub(super) fn migrate_set_parameters(
    context: &mut Context<'_>,
    mut arguments: Arguments,
) -> Answer {
    let mut changes = Vec::new();
    for &parameter in Parameter::ALL {
        let value = arguments.number(parameter.name())?;
        let (name, type_name) = (parameter.name(), parameter.type_name());
        if type_name == "uint8_t" && value.is_some_and(|value| value > u8::MAX.into()) {
            return Err(Error::Expects(name, type_name));
        }
        changes.extend(value.map(|value| (parameter, value)));
    }
    let mut texts = Vec::new();
    for text in Text::ALL {
        let value = arguments.string_or_null(text.name())?;
        texts.extend(value.map(|value| (text, value)));
    }
    let mode = one_of(&mut arguments, "mode", &Mode::ALL, Mode::name)?;
    let actions = TimeoutAction::ALL;
    let action = one_of(
        &mut arguments,
        "timeout-action",
        &actions,
        TimeoutAction::name,
    )?;
    arguments.finish()?;
    let settings = context.backend.settings();
    settings.set_parameters(&changes)?;
    for (text, value) in texts {
        settings.set_text(text, value);
    }
    if let Some(mode) = mode {
        settings.set_mode(mode);
    }
    if let Some(action) = action {
        settings.set_timeout_action(action);
    }
    done()
}

/// The argument `name`, if it is there, as the one of `all` that is called so.
fn one_of<T: Copy>(
    arguments: &mut Arguments,
    name: &'static str,
    all: &[T],
    name_of: fn(T) -> &'static str,
) -> Result<Option<T>, Error> {
    let Some(value) = arguments.optional_string(name)? else {
        return Ok(None);
    };
    match all.iter().find(|&&one| name_of(one) == value) {
        None => Err(Error::Value(name, value)),
        one => Ok(one.copied()),
    }
}

pub(super) fn query_migrate_capabilities(
    context: &mut Context<'_>,
    arguments: Arguments,
) -> Answer {
    arguments.finish()?;
    let settings = context.backend.settings();
    let all = Capability::ALL.iter();
    Ok(all
        .map(|&c| json!({ "capability": c.name(), "state": settings.is_on(c) }))
        .collect())
}

pub(super) fn migrate_set_capabilities(
    context: &mut Context<'_>,
    mut arguments: Arguments,
) -> Answer {
    let listed = arguments.objects("capabilities")?;
    let mut changes = Vec::new();
    for mut one in listed {
        let name = one.string("capability")?;
        let Some(capability) = Capability::from_name(&name) else {
            return Err(Error::Value("capability", name));
        };
        changes.push((capability, one.boolean("state")?));
        one.finish()?;
    }
    arguments.finish()?;
    context.backend.set_capabilities(&changes)?;
    done()
}

pub(super) fn migrate_continue(context: &mut Context<'_>, mut arguments: Arguments) -> Answer {
    let name = arguments.string("state")?;
    arguments.finish()?;
    let all = MigrationStatus::ALL.iter().copied();
    let Some(state) = all.into_iter().find(|state| state.name() == name) else {
        return Err(Error::Value("state", name));
    };
    context.backend.migrate_continue(state)?;
    done()
}
