//! The verdicts.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use statrs::distribution::{DiscreteCDF, Hypergeometric};

use super::compare::{self, Comparison, Figures};
use super::objective::{self, Kept};
use super::settings::Settings;
use crate::sets::{Key, Nature, Samples};
use crate::stats::{self, family, rank, z_above};

/// The name of the schema of `blackout check --json` and its version.
pub const SCHEMA: &str = "blackout.check/1";

/// The probability with which the runs that an open verdict asks for should settle it, and with
/// which the detectable slowdown is detected.
const POWER: f64 = 0.9;

/// More further runs than this are not asked for: the slowdown is at the threshold.
const MORE_MAX: usize = 1_000;

/// A regressed span is the way of another when that one's slowdown is at least this share of its.
const THROUGH: f64 = 0.5;

/// An answer, from good to bad.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// A slowdown as large as the threshold is excluded.
    Pass,
    /// Too few runs to tell.
    Inconclusive,
    /// It is slower.
    Regression,
}

/// A whole check.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Check {
    /// [`SCHEMA`].
    pub schema: String,
    /// The worst of all answers; a regression is worse than an open one.
    pub verdict: Verdict,
    /// Further runs of each set that should settle the open answers, where that many make sense.
    pub more_runs: Option<usize>,
    /// The downtime, the other figures, then the spans in call order.
    pub rows: Vec<Row>,
    /// The absolute limits.
    pub objectives: Vec<Kept>,
    /// Migrations that failed.
    pub failures: Failures,
    /// What makes the two sets hard to compare, a sentence each.
    pub warnings: Vec<String>,
    /// How the verdicts were reached.
    pub settings: Settings,
    /// The samples of the baseline.
    pub baseline: Samples,
    /// The samples that were held against it.
    pub current: Samples,
}

/// The answer on one series. Times are ns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Row {
    /// Which.
    #[serde(flatten)]
    pub key: Key,
    /// What its time is spent on.
    pub nature: Nature,
    /// How deep it is in its side's tree.
    pub depth: usize,
    /// The baseline.
    pub baseline: Figures,
    /// The current set.
    pub current: Figures,
    /// The Hodges–Lehmann estimate of the slowdown, and its 95 % bootstrap interval.
    pub shift_ns: Option<i64>,
    /// The interval's lower end.
    pub shift_low_ns: Option<i64>,
    /// Its upper end.
    pub shift_high_ns: Option<i64>,
    /// The probability of such ranks, or clearer ones, in any of the series judged, if none is
    /// slower: one-sided Mann–Whitney test, Holm's correction. Without correction where the series
    /// is not judged.
    pub p: f64,
    /// The least slowdown that matters.
    pub threshold_ns: i64,
    /// The slowdown that a check of so many runs finds in nine of ten cases.
    pub detectable_ns: Option<i64>,
    /// Whether it counts for the check's verdict.
    pub judged: bool,
    /// The answer.
    pub verdict: Verdict,
    /// Further runs of each set that should settle it, if it is open and that many make sense.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub more_runs: Option<usize>,
    /// Of a regression: the span inside that has most of it, for certain, or, of a figure of the whole
    /// migration, most likely.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub through: Option<String>,
    /// Whether it is faster, by more than the threshold and not by chance.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub faster: bool,
}

/// Failed migrations of both sets, and whether the current set has more of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Failures {
    /// Of the baseline.
    pub baseline: usize,
    /// Of the current set.
    pub current: usize,
    /// The probability of so many in the current set if they fall on both alike (Fisher).
    pub p: f64,
    /// `regression` below α, `inconclusive` if there are more, else `pass`.
    pub verdict: Verdict,
}

impl Check {
    /// Holds `current` against `baseline`. Deterministic.
    pub fn new(baseline: Samples, current: Samples, settings: Settings) -> Self {
        let comparisons = compare::compare(&baseline, &current);
        let rows = rows(&comparisons, &settings);
        let objectives: Vec<_> = settings
            .slo
            .iter()
            .map(|slo| objective::hold(slo, &current, &settings))
            .collect();
        let failures = Failures::of(&baseline, &current, settings.alpha);
        let judged = rows.iter().filter(|row| row.judged);
        // Without any series that was measured in both sets, nothing passes.
        let least = if judged.clone().next().is_some() {
            Verdict::Pass
        } else {
            Verdict::Inconclusive
        };
        let verdicts = judged.clone().map(|row| row.verdict);
        let kept = objectives.iter().map(|kept| kept.verdict);
        let verdict = verdicts
            .chain(kept)
            .chain([failures.verdict, least])
            .max()
            .unwrap_or(least);
        let more_runs = judged.filter_map(|row| row.more_runs).max();
        Self {
            schema: SCHEMA.to_owned(),
            verdict,
            more_runs,
            rows,
            objectives,
            failures,
            warnings: warnings(&baseline, &current),
            settings,
            baseline,
            current,
        }
    }

    /// The regressions that no span inside explains, and the spans that explain a regression without
    /// being certain ones themselves, the largest slowdown first: what to look at.
    pub fn culprits(&self) -> Vec<&Row> {
        let regressed = |row: &Row| row.judged && row.verdict == Verdict::Regression;
        let through: Vec<_> = self
            .rows
            .iter()
            .filter(|row| regressed(row))
            .filter_map(|row| row.through.as_deref())
            .collect();
        let is_culprit = |row: &&Row| match regressed(row) {
            true => row.through.is_none(),
            false => row.judged && through.contains(&row.key.to_string().as_str()),
        };
        let mut culprits: Vec<_> = self.rows.iter().filter(is_culprit).collect();
        culprits.sort_by_key(|row| std::cmp::Reverse(row.shift_ns));
        culprits
    }
}

impl Failures {
    fn of(baseline: &Samples, current: &Samples, alpha: f64) -> Self {
        let (before, now) = (baseline.left_out.failed, current.left_out.failed);
        let (seen, all) = (
            current.seen() as u64,
            (baseline.seen() + current.seen()) as u64,
        );
        // Of all migrations, the current set's are drawn: how many failed ones come up by chance?
        let p = match (now as u64).checked_sub(1) {
            Some(fewer) => Hypergeometric::new(all, (before + now) as u64, seen)
                .map_or(1.0, |chance| chance.sf(fewer)),
            None => 1.0,
        };
        let verdict = match () {
            () if p < alpha => Verdict::Regression,
            () if now > before => Verdict::Inconclusive,
            () => Verdict::Pass,
        };
        Self {
            baseline: before,
            current: now,
            p,
            verdict,
        }
    }
}

/// How a series takes part.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    /// The downtime: tested alone, with half of α.
    Downtime,
    /// Tested among the others, which share the other half.
    Family,
    /// Whatever it does, it cannot matter.
    Negligible,
    /// Shown only.
    Shown,
}

fn rows(comparisons: &[Comparison], settings: &Settings) -> Vec<Row> {
    let downtime = Key::whole("downtime");
    let median = |c: &Comparison| stats::median(&c.baseline).unwrap_or(0);
    let whole = comparisons.iter().find(|c| c.key == downtime);
    let downtime_ns = whole.map_or(0, median);
    let threshold = |c: &Comparison| settings.threshold(&c.key, median(c), downtime_ns);
    let roles: Vec<_> = comparisons
        .iter()
        .map(|c| role(c, threshold(c), settings))
        .collect();

    let family: Vec<_> = comparisons
        .iter()
        .zip(&roles)
        .filter(|(_, role)| **role == Role::Family)
        .map(|(c, _)| c.p_slower)
        .collect();
    let mut corrected = family::holm(&family).into_iter();
    // Half of α is the downtime's own: its power does not depend on the number of spans.
    let doubled = |p: f64| (2.0 * p).min(1.0);
    let rows: Vec<_> = comparisons
        .iter()
        .zip(&roles)
        .map(|(c, role)| {
            let (p, tests) = match role {
                Role::Downtime => (doubled(c.p_slower), 2),
                Role::Family => (doubled(corrected.next().unwrap_or(1.0)), 2 * family.len()),
                Role::Negligible | Role::Shown => (c.p_slower, 2 * family.len().max(1)),
            };
            row(c, *role, (p, tests), threshold(c), settings)
        })
        .collect();
    suspect(explain(rows, comparisons), comparisons, settings.alpha)
}

fn role(c: &Comparison, threshold_ns: i64, settings: &Settings) -> Role {
    let judged = match c.nature {
        Nature::Wait => false,
        Nature::Whole => c.key.name != "migration",
        Nature::Layer | Nature::Work | Nature::Kernel => true,
    };
    if !judged || !settings.judges(&c.key) || c.shift.is_none() {
        return Role::Shown;
    }
    if c.key == Key::whole("downtime") {
        return Role::Downtime;
    }
    // This looks at both sets as one, so it favours no outcome of the test: no two values differ by
    // so much.
    let pooled = || c.baseline.iter().chain(&c.current);
    let width = pooled().max().zip(pooled().min());
    if width.is_some_and(|(max, min)| max.saturating_sub(*min) <= threshold_ns) {
        return Role::Negligible;
    }
    Role::Family
}

fn row(
    c: &Comparison,
    role: Role,
    (p, tests): (f64, usize),
    threshold_ns: i64,
    settings: &Settings,
) -> Row {
    let alpha = settings.alpha / tests.max(1) as f64;
    let shift_ns = c.shift.map(|shift| shift.estimate);
    let beyond = |sign: i64| shift_ns.is_some_and(|shift| sign * shift > threshold_ns);
    let enough = c.baseline.len().min(c.current.len()) >= settings.min_runs;
    let moved: Vec<_> = c
        .baseline
        .iter()
        .map(|value| value.saturating_add(threshold_ns))
        .collect();
    // The current set would be faster than a baseline that was slower by the threshold.
    let within = || rank::p_larger(&c.current, &moved) < settings.miss;
    let verdict = match () {
        () if !enough || c.shift.is_none() => Verdict::Inconclusive,
        () if role == Role::Negligible => Verdict::Pass,
        () if p < settings.alpha && beyond(1) => Verdict::Regression,
        () if within() => Verdict::Pass,
        () => Verdict::Inconclusive,
    };
    let z_found = z_above(alpha) + z_above(1.0 - POWER);
    // Significance is one condition, an estimate beyond the threshold the other.
    let detectable = c.shift.map(|shift| {
        let beyond = threshold_ns as f64 + z_above(1.0 - POWER) * shift.error;
        beyond.max(z_found * shift.error).ceil() as i64
    });
    let open = verdict == Verdict::Inconclusive;
    Row {
        key: c.key.clone(),
        nature: c.nature,
        depth: c.depth,
        baseline: Figures::of(&c.baseline),
        current: Figures::of(&c.current),
        shift_ns,
        shift_low_ns: c.shift.map(|shift| shift.low),
        shift_high_ns: c.shift.map(|shift| shift.high),
        p,
        threshold_ns,
        detectable_ns: detectable,
        judged: role != Role::Shown,
        verdict,
        more_runs: open
            .then(|| more_runs(c, alpha, threshold_ns, settings))
            .flatten(),
        through: None,
        faster: c.p_faster < alpha && beyond(-1),
    }
}

/// How many further runs of each set should settle the verdict; `None` if so many that the slowdown
/// has to be taken as lying at the threshold.
fn more_runs(c: &Comparison, alpha: f64, threshold_ns: i64, settings: &Settings) -> Option<usize> {
    let runs = c.baseline.len().min(c.current.len());
    // With fewer, no ranks at all are as improbable as α asks for.
    let least = (settings.min_runs..).find(|n| rank::least_p(*n, *n) < alpha)?;
    let needed = match c.shift {
        Some(shift) if runs >= settings.min_runs => {
            let slower = shift.estimate > threshold_ns;
            let (distance, z) = if slower {
                (shift.estimate as f64, z_above(alpha))
            } else {
                let distance = threshold_ns.saturating_sub(shift.estimate);
                (distance as f64, z_above(settings.miss))
            };
            let ratio = (z + z_above(1.0 - POWER)) * shift.error / distance;
            // The error falls with the square root of the number of runs.
            let needed = (runs as f64 * ratio * ratio).ceil();
            (needed.is_finite() && needed < 1e6).then_some(needed as usize)?
        }
        _ => least,
    };
    let more = needed.max(least).saturating_sub(runs).max(1);
    (more <= MORE_MAX).then_some(more)
}

/// Says of each regression inside of which other one it is.
fn explain(mut rows: Vec<Row>, comparisons: &[Comparison]) -> Vec<Row> {
    let regressed: Vec<_> = rows
        .iter()
        .zip(comparisons)
        .filter(|(row, _)| row.judged && row.verdict == Verdict::Regression)
        .map(|(row, c)| (row.key.clone(), c.parent.clone(), row.shift_ns.unwrap_or(0)))
        .collect();
    for row in &mut rows {
        if row.verdict != Verdict::Regression {
            continue;
        }
        let inside = regressed
            .iter()
            .filter(|(key, parent, _)| match row.key.side {
                Some(_) => key.side == row.key.side && parent.as_deref() == Some(&row.key.name),
                // A figure of the whole migration is the sum of what is outermost on both sides.
                None => key.side.is_some() && parent.is_none(),
            });
        let largest = inside.max_by_key(|(.., shift_ns)| *shift_ns);
        let share = THROUGH * row.shift_ns.unwrap_or(0) as f64;
        row.through = largest
            .filter(|(.., shift_ns)| *shift_ns as f64 >= share)
            .map(|(key, ..)| key.to_string());
    }
    rows
}

/// Names the likeliest span for a figure of the whole migration that got worse while no span did for
/// certain. That something is slower is known then, so what is asked of a span is less: to be slow
/// beyond chance by itself, uncorrected, and by as much as explains the figure.
fn suspect(mut rows: Vec<Row>, comparisons: &[Comparison], alpha: f64) -> Vec<Row> {
    let slow: Vec<_> = rows
        .iter()
        .zip(comparisons)
        .filter(|(row, c)| row.judged && row.key.side.is_some() && c.p_slower < alpha)
        .map(|(row, c)| (row.key.clone(), c.parent.clone(), row.shift_ns.unwrap_or(0)))
        .collect();
    for row in &mut rows {
        let regressed = row.judged && row.verdict == Verdict::Regression;
        if !regressed || row.key.side.is_some() || row.through.is_some() {
            continue;
        }
        let enough = THROUGH * row.shift_ns.unwrap_or(0) as f64;
        let likely = || slow.iter().filter(|(.., ns)| *ns as f64 >= enough);
        let has_inner = |outer: &Key| {
            likely().any(|(inner, parent, _)| {
                inner.side == outer.side && parent.as_deref() == Some(&outer.name)
            })
        };
        let innermost = likely().filter(|(key, ..)| !has_inner(key));
        row.through = innermost
            .max_by_key(|(.., shift_ns)| *shift_ns)
            .map(|(key, ..)| key.to_string());
    }
    rows
}

fn warnings(baseline: &Samples, current: &Samples) -> Vec<String> {
    let mut warnings = Vec::new();
    let kernels = |set: &Samples| {
        let mut kernels: Vec<_> = set
            .hosts
            .iter()
            .map(|host| format!("Linux {} {}", host.kernel, host.arch))
            .collect();
        kernels.sort();
        kernels.dedup();
        kernels.join(", ")
    };
    let (before, now) = (kernels(baseline), kernels(current));
    if before != now && !before.is_empty() && !now.is_empty() {
        warnings.push(format!(
            "the baseline ran on {before}, the current set on {now}: a difference may be the host's"
        ));
    }
    let mut views: Vec<_> = baseline.views.iter().chain(&current.views).collect();
    views.dedup();
    if views.len() > 1 {
        let text = "some migrations were seen by probes and some by the kernel alone: \
                    their downtimes begin at different moments";
        warnings.push(text.to_owned());
    }
    for (name, set) in [("baseline", baseline), ("current set", current)] {
        let left = &set.left_out;
        let counts = [
            (left.failed, "failed"),
            (left.unfinished, "did not complete"),
            (left.unmeasured, "without a measured downtime"),
            (left.doubtful, "in doubt"),
        ];
        let said: Vec<_> = counts
            .into_iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, what)| format!("{count} {what}"))
            .collect();
        if !said.is_empty() {
            let (said, seen) = (said.join(", "), set.seen());
            warnings.push(format!("{name}: of {seen} migrations, left out: {said}"));
        }
        let most = left.doubts.iter().max_by_key(|(_, count)| **count);
        if let Some((doubt, count)) = most {
            warnings.push(format!("{name}: {count} × {doubt}"));
        }
    }
    warnings
}
