//! How honest and how sharp the gate is: `cargo bench -p blackout --bench gate`.
//!
//! Takes samples of real migrations (or those of `-- FILE...`), draws pairs of sets from them again
//! and again, and lets the gate judge each pair. Of pairs that differ by nothing but chance, at most
//! α may be called slower. In others a delay of a tenth of the median downtime is put into one
//! handler: the gate has to find it, and to name that handler first. Exits with 1 if it does not.

use std::path::PathBuf;
use std::process::ExitCode;
use std::{env, thread};

use blackout::analysis::Side;
use blackout::gate::{Check, Settings, Verdict};
use blackout::sets::collect::Collector;
use blackout::sets::{Key, Samples, read};

/// 160 migrations of a bare-metal guest on x86-64, on a machine that compiled all the while.
const REAL: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/golden/recordings/busy.samples.json"
);

/// Migrations in each set of a pair.
const RUNS: usize = 20;

/// Pairs of equal sets.
const EQUAL: u64 = 1_000;

/// Pairs with a delay.
const DELAYED: u64 = 400;

/// Of equal pairs, so many may be called slower.
const FALSE_MAX: f64 = 0.01;

/// Of delayed pairs, so many have to be.
const FOUND_MIN: f64 = 0.95;

fn main() -> ExitCode {
    // Cargo hands its own flags to a benchmark.
    let files: Vec<_> = env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with("--"))
        .collect();
    let files: Vec<_> = match files.as_slice() {
        [] => vec![PathBuf::from(REAL)],
        files => files.iter().map(PathBuf::from).collect(),
    };
    let mut set = Collector::new(false);
    if let Err(error) = read::into(&mut set, &files) {
        eprintln!("error: {error}");
        return ExitCode::from(3);
    }
    let real = set.finish(None);
    println!(
        "{} real migrations, pairs of {RUNS} + {RUNS}",
        real.migrations
    );

    let handler = handler(&real);
    let downtimes = real
        .series(&Key::whole("downtime"))
        .map(|series| series.sorted());
    let median = downtimes
        .and_then(|sorted| blackout::stats::median(&sorted))
        .unwrap_or(0);
    let delay_ns = u64::try_from(median / 10).unwrap_or(0);

    let equal = tally(EQUAL, |seed| judge(&real, seed, None));
    let share = |count: u64, of: u64| count as f64 / of as f64;
    let wrong = share(equal.regression, EQUAL);
    println!(
        "equal:   {EQUAL} pairs: {} pass, {} inconclusive, {} called slower ({:.2} %, at most {:.0} %)",
        equal.pass,
        equal.inconclusive,
        equal.regression,
        wrong * 100.0,
        FALSE_MAX * 100.0
    );
    let delayed = tally(DELAYED, |seed| {
        judge(&real, seed, Some((&handler, delay_ns)))
    });
    let (found, named) = (
        share(delayed.regression, DELAYED),
        share(delayed.named, DELAYED),
    );
    println!(
        "delayed: {DELAYED} pairs, {delay_ns} ns in {handler}: {:.1} % found, {:.1} % named (at least {:.0} %)",
        found * 100.0,
        named * 100.0,
        FOUND_MIN * 100.0
    );
    ExitCode::from(u8::from(
        wrong > FALSE_MAX || found < FOUND_MIN || named < FOUND_MIN,
    ))
}

/// The state handler of the source that costs most: the likeliest place of a regression.
fn handler(real: &Samples) -> Key {
    let handlers = real.series.iter().filter(|series| {
        series.key.side == Some(Side::Source) && series.key.name.starts_with("vm_state_handler")
    });
    let costs = handlers.map(|series| (blackout::stats::median(&series.sorted()), &series.key));
    costs
        .max()
        .map_or_else(|| Key::whole("downtime"), |(_, key)| key.clone())
}

#[derive(Default)]
struct Tally {
    pass: u64,
    inconclusive: u64,
    regression: u64,
    named: u64,
}

/// Counts the verdicts of `pairs` pairs, on two threads.
fn tally(pairs: u64, judge: impl Fn(u64) -> (Verdict, bool) + Sync) -> Tally {
    let judge = &judge;
    let verdicts: Vec<_> = thread::scope(|scope| {
        let halves: Vec<_> = (0..2)
            .map(|half| {
                let seeds = (0..pairs).filter(move |seed| seed % 2 == half);
                scope.spawn(move || seeds.map(judge).collect::<Vec<_>>())
            })
            .collect();
        halves
            .into_iter()
            .flat_map(|half| half.join().unwrap_or_default())
            .collect()
    });
    let mut tally = Tally::default();
    for (verdict, named) in verdicts {
        *match verdict {
            Verdict::Pass => &mut tally.pass,
            Verdict::Inconclusive => &mut tally.inconclusive,
            Verdict::Regression => &mut tally.regression,
        } += 1;
        tally.named += u64::from(named);
    }
    tally
}

/// One pair, drawn without putting back: the verdict, and whether it names the delayed handler
/// first among the spans.
fn judge(real: &Samples, seed: u64, delay: Option<(&Key, u64)>) -> (Verdict, bool) {
    let mut order: Vec<_> = (0..real.migrations).collect();
    fastrand::Rng::with_seed(seed).shuffle(&mut order);
    let (first, rest) = order.split_at(RUNS.min(order.len()));
    let second = &rest[..RUNS.min(rest.len())];
    let mut current = draw(real, second);
    if let Some((key, ns)) = delay {
        slow(&mut current, key, ns);
    }
    let check = Check::new(draw(real, first), current, Settings::default());
    let spans = check.culprits();
    let first = spans.iter().find(|row| row.key.side.is_some());
    let named = first.is_some_and(|row| delay.is_some_and(|(key, _)| row.key == *key));
    (check.verdict, named)
}

fn draw(real: &Samples, chosen: &[usize]) -> Samples {
    let mut drawn = real.clone();
    drawn.migrations = chosen.len();
    for series in &mut drawn.series {
        series.ns = chosen.iter().map(|index| series.ns[*index]).collect();
    }
    drawn
}

/// Puts a delay into a span and all that is around it.
fn slow(samples: &mut Samples, key: &Key, ns: u64) {
    let mut around = vec![key.clone(), Key::whole("downtime"), Key::whole("blackout")];
    let mut next = Some(key.clone());
    while let Some(parent) = next
        .and_then(|key| Some((key.side, samples.series(&key)?.parent.clone()?)))
        .map(|(side, name)| Key { side, name })
    {
        around.push(parent.clone());
        next = Some(parent);
    }
    for series in samples
        .series
        .iter_mut()
        .filter(|series| around.contains(&series.key))
    {
        for value in series.ns.iter_mut().flatten() {
            *value += ns;
        }
    }
}
