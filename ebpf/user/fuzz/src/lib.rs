//! Recordings out of a fuzzer's bytes, and everything that the tool makes of one.

mod tape;

use std::io::{self, Write};

use blackout::analysis::{self, Loaded};
use blackout::export::{chrome, csv, folded, perfetto, speedscope};
use blackout::html::{self, Page};
use blackout::recording::{Error, MAGIC, Reader, VERSION};
use blackout::report::{schema::Report, text};
use blackout::sets::{self, collect::Collector};
use blackout::top::{model::Model, screen};
use blackout::watch::metrics::Metrics;
use tempfile::NamedTempFile;

/// The recording that `data` stands for. Its first byte says how: as the file's own bytes, as frames
/// whose lengths are right, or as frames that this version writes, with any numbers in them.
pub fn recording(data: &[u8]) -> Vec<u8> {
    let Some((kind, data)) = data.split_first() else {
        return Vec::new();
    };
    let mut file = MAGIC.to_vec();
    file.extend(VERSION.to_le_bytes());
    match kind % 4 {
        0 => file.extend(data),
        1 => {
            file = tape::begun();
            let mut rest = data;
            while let Some((length, after)) = rest.split_first() {
                let (payload, after) = after.split_at(usize::from(length & 0x7f).min(after.len()));
                if let Ok(length @ 1..) = u8::try_from(payload.len()) {
                    file.push(length);
                    file.extend(payload);
                }
                rest = after;
            }
        }
        _ => file = tape::of(data),
    }
    file
}

/// Everything that the tool makes of a recording. What it writes goes nowhere, so that a large
/// output is no large memory.
///
/// # Errors
/// Why the recording was refused.
pub fn all(bytes: &[u8]) -> Result<(), Error> {
    let name = || "fuzzed.rec".to_owned();
    let recordings = Loaded::read(name(), Reader::new(name(), bytes)?)?;
    let migrations = analysis::find(&recordings);
    let report = Report::new(&migrations);
    let mut set = Collector::new(true).keeping(html::TIMELINES);
    let mut metrics = Metrics::default();
    for (told, measured) in report.migrations.iter().zip(&migrations) {
        // Migrations that do not make one set are refused by name.
        let _ = set.add(told);
        metrics.migrated(measured);
    }
    let kept = set.kept();
    let samples = set.finish(None);
    let written = |out: &mut dyn Write| -> io::Result<()> {
        text::write(out, &recordings, &migrations)?;
        serde_json::to_writer(&mut *out, &report)?;
        sets::text::write(out, &samples)?;
        let page = Page {
            migrations: &kept,
            samples: &samples,
            compared: None,
        };
        html::write(out, &page)
    };
    written(&mut io::sink()).expect("nowhere takes everything");
    let out = &mut io::sink();
    let exported = chrome::write(out, &recordings, &migrations)
        .and_then(|()| perfetto::write(out, &recordings, &migrations))
        .and_then(|()| speedscope::write(out, &migrations))
        .and_then(|()| folded::write(out, &migrations))
        .and_then(|()| csv::write(out, &report));
    exported.expect("nowhere takes everything");
    let mut model = Model::default();
    for frame in Reader::new(name(), bytes)? {
        if let Some(at) = model.see(&frame?) {
            model.tick(at);
        }
    }
    screen::text(&model, 80, 24);
    by_parts(bytes)
}

/// What is made of a file that is too long to be held: it is read again and again, a part at a time.
fn by_parts(bytes: &[u8]) -> Result<(), Error> {
    let mut file = NamedTempFile::new_in("/dev/shm").expect("there is shared memory");
    file.write_all(bytes).expect("there is shared memory left");
    let recordings = Loaded::read_migrations(file.path())?;
    let migrations = analysis::find(&recordings);
    let out = &mut io::sink();
    chrome::write(out, &recordings, &migrations)
        .and_then(|()| perfetto::write(out, &recordings, &migrations))
        .expect("the file is still there");
    Ok(())
}
