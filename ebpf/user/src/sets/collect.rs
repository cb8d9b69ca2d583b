//! From reports to samples.

use std::collections::HashMap;

use blackout_abi::probes;
use thiserror::Error;

use super::samples::{Key, Nature, SCHEMA, Samples, Series, Table};
use crate::analysis::Side;
use crate::analysis::downtime::WHOLES;
use crate::analysis::migration::View;
use crate::report::schema::{Host, Migration};

/// More migrations than this in one set are refused: no comparison needs them.
pub const MIGRATIONS_MAX: usize = 10_000;

/// More spans than this are refused: a VMM has some sixty.
pub const SERIES_MAX: usize = 1_000;

/// Why no set could be made.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// There are more than [`MIGRATIONS_MAX`].
    #[error("more than {MIGRATIONS_MAX} migrations in one set; give fewer recordings")]
    Migrations,
    /// There are more than [`SERIES_MAX`].
    #[error(
        "more than {SERIES_MAX} different spans in one set: a probe's name or argument differs \
         from one migration to the next"
    )]
    Spans,
    /// Two files that are put together have values for different numbers of migrations.
    #[error("{0} has {1} values for {2} migrations")]
    Length(Key, usize, usize),
}

/// A set that grows by one migration at a time.
#[derive(Debug, Default)]
pub struct Collector {
    migrations: usize,
    hosts: Vec<Host>,
    views: Vec<View>,
    left_out: super::Left,
    series: Vec<Series>,
    tables: Vec<Table>,
    places: HashMap<Key, usize>,
    /// Whether migrations whose figures are in doubt count.
    doubtful: bool,
    /// So many migrations are kept whole.
    keep: usize,
    kept: Vec<Migration>,
}

impl Collector {
    /// An empty set. `doubtful` says whether migrations count whose figures are in doubt.
    pub fn new(doubtful: bool) -> Self {
        Self {
            doubtful,
            ..Self::default()
        }
    }

    /// Keeps the first `keep` migrations whole, whether they have samples or not.
    pub fn keeping(mut self, keep: usize) -> Self {
        self.keep = keep;
        self
    }

    /// The migrations that were kept.
    pub fn kept(&mut self) -> Vec<Migration> {
        std::mem::take(&mut self.kept)
    }

    /// Adds a migration, or counts why it was left out.
    ///
    /// # Errors
    /// When the set would outgrow its bounds.
    pub fn add(&mut self, migration: &Migration) -> Result<(), Error> {
        for host in &migration.hosts {
            if !self.hosts.contains(host) {
                self.hosts.push(host.clone());
            }
        }
        if self.kept.len() < self.keep {
            self.kept.push(migration.clone());
        }
        if !self.views.contains(&migration.view) {
            self.views.push(migration.view);
        }
        let left = &mut self.left_out;
        let (Some(downtime_ns), Some(start_ns)) =
            (migration.downtime_ns, migration.downtime_start_ns)
        else {
            match migration.status.as_str() {
                "failed" => left.failed += 1,
                "completed" => left.unmeasured += 1,
                _ => left.unfinished += 1,
            }
            return Ok(());
        };
        if migration.status != "completed" {
            match migration.status.as_str() {
                "failed" => left.failed += 1,
                _ => left.unfinished += 1,
            }
            return Ok(());
        }
        if !migration.doubts.is_empty() && !self.doubtful {
            left.doubtful += 1;
            for doubt in &migration.doubts {
                *left.doubts.entry(doubt.clone()).or_default() += 1;
            }
            return Ok(());
        }
        if self.migrations >= MIGRATIONS_MAX {
            return Err(Error::Migrations);
        }
        self.migrations += 1;
        self.wholes(migration, downtime_ns)?;
        let end_ns = start_ns.saturating_add_unsigned(downtime_ns);
        self.spans(migration, (start_ns, end_ns))?;
        if migration.view == View::Kernel {
            self.ioctls(migration, (start_ns, end_ns))?;
        }
        // What did not run took no time.
        for series in &mut self.series {
            let missing = (series.nature != Nature::Whole).then_some(0);
            series.ns.resize(self.migrations, missing);
        }
        Ok(())
    }

    /// Adds a whole set, such as one that was kept in a file.
    ///
    /// # Errors
    /// When the set would outgrow its bounds, or contradicts itself.
    pub fn extend(&mut self, samples: Samples) -> Result<(), Error> {
        let before = self.migrations;
        if before.saturating_add(samples.migrations) > MIGRATIONS_MAX {
            return Err(Error::Migrations);
        }
        for series in &samples.series {
            if series.ns.len() != samples.migrations {
                let (key, length) = (series.key.clone(), series.ns.len());
                return Err(Error::Length(key, length, samples.migrations));
            }
        }
        self.migrations += samples.migrations;
        self.tables.extend(samples.tables);
        for host in samples.hosts {
            if !self.hosts.contains(&host) {
                self.hosts.push(host);
            }
        }
        for view in samples.views {
            if !self.views.contains(&view) {
                self.views.push(view);
            }
        }
        let (left, more) = (&mut self.left_out, samples.left_out);
        left.failed = left.failed.saturating_add(more.failed);
        left.unfinished = left.unfinished.saturating_add(more.unfinished);
        left.unmeasured = left.unmeasured.saturating_add(more.unmeasured);
        left.doubtful = left.doubtful.saturating_add(more.doubtful);
        for (doubt, count) in more.doubts {
            let known = left.doubts.entry(doubt).or_default();
            *known = known.saturating_add(count);
        }
        for series in samples.series {
            let nature = series.nature;
            let known = self.place(series.key, nature, series.depth, series.parent)?;
            let missing = (nature != Nature::Whole).then_some(0);
            known.ns.resize(before, missing);
            known.ns.extend(series.ns);
        }
        for series in &mut self.series {
            let missing = (series.nature != Nature::Whole).then_some(0);
            series.ns.resize(self.migrations, missing);
        }
        Ok(())
    }

    /// The set.
    pub fn finish(self, commit: Option<String>) -> Samples {
        Samples {
            schema: SCHEMA.to_owned(),
            hosts: self.hosts,
            views: self.views,
            commit,
            migrations: self.migrations,
            left_out: self.left_out,
            series: self.series,
            tables: self.tables,
        }
    }

    fn wholes(&mut self, migration: &Migration, downtime_ns: u64) -> Result<(), Error> {
        let unexplained = migration
            .explained
            .map(|share| ((1.0 - share.clamp(0.0, 1.0)) * downtime_ns as f64).round() as u64);
        let mut spans = migration.spans.iter();
        let whole = spans.find(|span| span.side == Side::Source && span.name == "migrate");
        let wholes = [
            ("downtime", Some(downtime_ns)),
            ("blackout", migration.blackout_ns),
            ("unexplained", unexplained),
            ("migration", whole.map(|span| span.duration_ns)),
        ];
        for (name, ns) in wholes {
            self.put(Key::whole(name), Nature::Whole, 0, None, ns)?;
        }
        Ok(())
    }

    fn spans(&mut self, migration: &Migration, downtime: (i64, i64)) -> Result<(), Error> {
        // The spans around the one at hand, with their depths; a thread begins at depth 0.
        let mut around: Vec<(u64, String)> = Vec::new();
        for span in &migration.spans {
            while around.pop_if(|(depth, _)| *depth >= span.depth).is_some() {}
            let counts = span.side != Side::Wire && !WHOLES.contains(&span.name.as_str());
            let inside_ns = overlap_ns((span.start_ns, span.duration_ns), downtime);
            if !counts || inside_ns == 0 {
                continue;
            }
            let name = if span.label.is_empty() {
                &span.name
            } else {
                &span.label
            };
            let key = Key {
                side: Some(span.side),
                name: name.clone(),
            };
            let (depth, parent) = (around.len(), around.last().map(|(_, name)| name.clone()));
            self.put(key, nature(&span.name), depth, parent, Some(inside_ns))?;
            around.push((span.depth, name.clone()));
        }
        for operation in &migration.its {
            if let (Some(devices), Some(events)) = (operation.devices, operation.events) {
                self.tables.push(Table {
                    op: operation.op.clone(),
                    devices,
                    events,
                    ns: operation.duration_ns,
                    kernel_ns: operation.kernel_ns,
                });
            }
            let Some(kernel_ns) = operation.kernel_ns else {
                continue;
            };
            let key = Key {
                side: Some(operation.side),
                name: format!("{} in the kernel", operation.op),
            };
            self.put(key, Nature::Kernel, 0, None, Some(kernel_ns))?;
        }
        Ok(())
    }

    /// The ioctls of a monitor without probes: all that was seen of it.
    fn ioctls(&mut self, migration: &Migration, downtime: (i64, i64)) -> Result<(), Error> {
        for ioctl in &migration.ioctls {
            let inside_ns = overlap_ns((ioctl.start_ns, ioctl.duration_ns), downtime);
            if inside_ns == 0 {
                continue;
            }
            let key = Key {
                side: Some(ioctl.side),
                name: format!("ioctl {}", ioctl.name),
            };
            self.put(key, Nature::Kernel, 0, None, Some(inside_ns))?;
        }
        Ok(())
    }

    /// Puts a value of the migration that is being added into its series. What runs twice in one
    /// migration took the sum.
    fn put(
        &mut self,
        key: Key,
        nature: Nature,
        depth: usize,
        parent: Option<String>,
        ns: Option<u64>,
    ) -> Result<(), Error> {
        let place = self.migrations.saturating_sub(1);
        let series = self.place(key, nature, depth, parent)?;
        series.ns.resize_with(place.max(series.ns.len()), || {
            (nature != Nature::Whole).then_some(0)
        });
        match (series.ns.get_mut(place), ns) {
            (Some(Some(sum)), Some(ns)) => *sum = sum.saturating_add(ns),
            (Some(known), ns) => *known = known.or(ns),
            (None, ns) => series.ns.push(ns),
        }
        Ok(())
    }

    fn place(
        &mut self,
        key: Key,
        nature: Nature,
        depth: usize,
        parent: Option<String>,
    ) -> Result<&mut Series, Error> {
        let next = self.series.len();
        let place = *self.places.entry(key.clone()).or_insert(next);
        if place == next {
            if next >= SERIES_MAX {
                return Err(Error::Spans);
            }
            self.series.push(Series {
                key,
                nature,
                depth,
                parent,
                ns: Vec::new(),
            });
        }
        self.series.get_mut(place).ok_or(Error::Spans)
    }
}

/// How much of what began `at` and took `duration_ns` lies between `start_ns` and `end_ns`.
fn overlap_ns((at, duration_ns): (i64, u64), (start_ns, end_ns): (i64, i64)) -> u64 {
    let until = at.saturating_add_unsigned(duration_ns);
    let inside = until.min(end_ns).saturating_sub(at.max(start_ns));
    u64::try_from(inside).unwrap_or(0)
}

/// By the probe table; a foreign probe's time is work.
fn nature(row: &str) -> Nature {
    match probes::span(row).map(|span| span.nature) {
        Some(probes::Nature::Layer) => Nature::Layer,
        Some(probes::Nature::Wait) => Nature::Wait,
        Some(probes::Nature::Work) | None => Nature::Work,
    }
}
