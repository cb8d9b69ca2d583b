//! The samples themselves, which are also a file format: `blackout.samples/1`.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::analysis::Side;
use crate::analysis::migration::View;
use crate::report::schema::Host;

/// The name of the schema and its version.
pub const SCHEMA: &str = "blackout.samples/1";

/// What a set of migrations took, a series of values for each span. Times are ns.
///
/// Small enough to commit as a baseline: one number a span and migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Samples {
    /// [`SCHEMA`].
    pub schema: String,
    /// The hosts on which they ran, without repetition.
    pub hosts: Vec<Host>,
    /// How the migrations were seen, without repetition: what a downtime is depends on it.
    #[serde(default)]
    pub views: Vec<View>,
    /// The revision of the monitor, if it was told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// Migrations with a value in each series.
    pub migrations: usize,
    /// Migrations that were left out, and why.
    #[serde(default, skip_serializing_if = "Left::is_empty")]
    pub left_out: Left,
    /// First `downtime`, `blackout`, `unexplained` and `migration`, then each side's spans in call
    /// order.
    pub series: Vec<Series>,
    /// Each save and restore of the interrupt controller's tables, with what they held.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tables: Vec<Table>,
}

/// One save or restore of tables whose size was told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// The span's name.
    pub op: String,
    /// Devices that the ITS maps.
    pub devices: u64,
    /// Events that it maps, of all devices.
    pub events: u64,
    /// The monitor's view.
    pub ns: u64,
    /// The kernel's view.
    pub kernel_ns: Option<u64>,
}

/// Migrations without samples.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Left {
    /// They failed.
    #[serde(default)]
    pub failed: usize,
    /// They were cancelled, or the recording ends before they do.
    #[serde(default)]
    pub unfinished: usize,
    /// They completed, but the downtime could not be measured.
    #[serde(default)]
    pub unmeasured: usize,
    /// Events were lost, or something else puts their figures in doubt.
    #[serde(default)]
    pub doubtful: usize,
    /// The reasons for doubt, with the number of migrations that each was met in.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub doubts: BTreeMap<String, usize>,
}

impl Left {
    /// Whether no migration was left out.
    pub fn is_empty(&self) -> bool {
        self.failed + self.unfinished + self.unmeasured + self.doubtful == 0
    }
}

/// What a series is about.
#[derive(
    Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
pub struct Key {
    /// The side, of a span; none for a figure of the whole migration.
    pub side: Option<Side>,
    /// The span's label, or the figure's name.
    pub name: String,
}

impl Key {
    /// The figure `name` of whole migrations.
    pub fn whole(name: &str) -> Self {
        Self {
            side: None,
            name: name.to_owned(),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.side {
            Some(side) => write!(f, "{side}: {}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// What a series' time is spent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Nature {
    /// A figure of the whole migration.
    Whole,
    /// A span that only calls others.
    Layer,
    /// A span that does work.
    Work,
    /// A span that waits for the other side.
    Wait,
    /// The kernel's view of a span.
    Kernel,
}

/// One span's part of the downtime in each migration, or one figure's value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Series {
    /// Which.
    #[serde(flatten)]
    pub key: Key,
    /// What the time is spent on.
    pub nature: Nature,
    /// How deep it is in its side's tree.
    #[serde(default)]
    pub depth: usize,
    /// The name of the span around it, on the same side.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// The values, ns; the place in the list is the migration. A span that did not run in a
    /// migration took 0; a figure that was not seen is `null`.
    pub ns: Vec<Option<u64>>,
}

impl Series {
    /// The values that were seen, in order of size.
    pub fn sorted(&self) -> Vec<i64> {
        let mut values: Vec<_> = self
            .ns
            .iter()
            .flatten()
            .map(|ns| crate::stats::value(*ns))
            .collect();
        values.sort_unstable();
        values
    }
}

impl Samples {
    /// The series of that key.
    pub fn series(&self, key: &Key) -> Option<&Series> {
        self.series.iter().find(|series| series.key == *key)
    }

    /// Writes them as JSON with a line a series, so that a baseline can be reviewed in a diff.
    ///
    /// # Errors
    /// What `out` returns.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let head = Self {
            series: Vec::new(),
            tables: Vec::new(),
            ..self.clone()
        };
        let mut head = serde_json::to_value(&head)?;
        let members = head.as_object_mut().into_iter().flatten();
        writeln!(out, "{{")?;
        for (name, value) in members.filter(|(name, _)| *name != "series") {
            writeln!(out, "  {}: {value},", serde_json::to_string(name)?)?;
        }
        write!(out, "  \"series\": ")?;
        lines(out, &self.series)?;
        if !self.tables.is_empty() {
            write!(out, ",\n  \"tables\": ")?;
            lines(out, &self.tables)?;
        }
        writeln!(out, "\n}}")
    }

    /// All migrations, also those without samples.
    pub fn seen(&self) -> usize {
        let left = &self.left_out;
        self.migrations + left.failed + left.unfinished + left.unmeasured + left.doubtful
    }
}

/// A list with a line an item.
fn lines(out: &mut dyn Write, items: &[impl Serialize]) -> io::Result<()> {
    write!(out, "[")?;
    for (index, item) in items.iter().enumerate() {
        let comma = if index == 0 { "" } else { "," };
        write!(out, "{comma}\n    {}", serde_json::to_string(item)?)?;
    }
    write!(out, "\n  ]")
}
