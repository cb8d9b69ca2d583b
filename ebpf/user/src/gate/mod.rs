//! Did the blackout get longer? One of three answers, for the downtime and for each span.
//!
//! * **regression**: the current set is slower, by more than a threshold, and chance is no
//!   explanation: one-sided Mann–Whitney test, corrected for the number of spans, below α.
//! * **pass**: a slowdown as large as the threshold is excluded: the same test, of the current set
//!   against the baseline moved by the threshold, in the other direction.
//! * **inconclusive**: neither; with the number of further runs that should tell.
//!
//! [`compare`] does the arithmetic on two sets, [`settings`] holds the thresholds, [`check`] gives
//! the verdicts, [`objective`] holds figures against absolute limits. What is written of it is in
//! [`text`] and [`formats`]. [`side_by_side`] shows two sets without a verdict.

pub mod check;
pub mod compare;
pub mod formats;
pub mod objective;
pub mod settings;
pub mod side_by_side;
pub mod text;

pub use check::{Check, Row, SCHEMA, Verdict};
pub use compare::Comparison;
pub use settings::Settings;
