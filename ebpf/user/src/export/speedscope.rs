//! speedscope's own format: one profile a thread, each frame with its begin and end, in ns since the
//! migration's start. Chrome's format opens there too, but with microseconds and without the
//! migrations' names.

use std::collections::HashMap;
use std::io::{self, Write};

use serde::Serialize;

use super::stacks;
use crate::analysis::Migration;

/// Where the format is described.
const SCHEMA: &str = "https://www.speedscope.app/file-format-schema.json";

#[derive(Serialize)]
struct File {
    #[serde(rename = "$schema")]
    schema: &'static str,
    exporter: String,
    shared: Shared,
    profiles: Vec<Profile>,
}

#[derive(Serialize)]
struct Shared {
    frames: Vec<Name>,
}

#[derive(Serialize)]
struct Name {
    name: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Profile {
    r#type: &'static str,
    name: String,
    unit: &'static str,
    start_value: i64,
    end_value: i64,
    events: Vec<Event>,
}

#[derive(Serialize)]
struct Event {
    r#type: &'static str,
    frame: usize,
    at: i64,
}

/// Writes all threads of all `migrations`.
///
/// # Errors
/// What `out` returns.
pub fn write(out: &mut impl Write, migrations: &[Migration<'_>]) -> io::Result<()> {
    let mut names = Names::default();
    let mut profiles = Vec::new();
    for migration in migrations {
        let id = migration
            .id
            .map_or_else(String::new, |id| format!(" of migration {id}"));
        for (thread, frames) in stacks::threads(migration, (0, migration.end_ns)) {
            profiles.push(Profile {
                r#type: "evented",
                name: format!("{thread}{id}"),
                unit: "nanoseconds",
                start_value: 0,
                end_value: migration.end_ns.max(0),
                events: events(&mut names, &frames),
            });
        }
    }
    let file = File {
        schema: SCHEMA,
        exporter: format!("blackout {}", env!("CARGO_PKG_VERSION")),
        shared: Shared {
            frames: names.list.into_iter().map(|name| Name { name }).collect(),
        },
        profiles,
    };
    serde_json::to_writer(&mut *out, &file)?;
    writeln!(out)
}

/// Each begin and end, in order; an end comes before what begins at the same time.
fn events(names: &mut Names, frames: &[stacks::Frame]) -> Vec<Event> {
    let mut events = Vec::with_capacity(frames.len() * 2);
    let mut open: Vec<(usize, i64)> = Vec::new();
    for frame in frames {
        while open.len() > frame.depth {
            events.extend(open.pop().map(close));
        }
        let name = names.index(&frame.name);
        events.push(Event {
            r#type: "O",
            frame: name,
            at: frame.start_ns,
        });
        open.push((name, frame.end_ns));
    }
    events.extend(open.into_iter().rev().map(close));
    events
}

fn close((frame, at): (usize, i64)) -> Event {
    let r#type = "C";
    Event { r#type, frame, at }
}

/// Each name once.
#[derive(Default)]
struct Names {
    list: Vec<String>,
    places: HashMap<String, usize>,
}

impl Names {
    fn index(&mut self, name: &str) -> usize {
        if let Some(index) = self.places.get(name) {
            return *index;
        }
        let index = self.list.len();
        self.list.push(name.to_owned());
        self.places.insert(name.to_owned(), index);
        index
    }
}
