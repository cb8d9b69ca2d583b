//! `cargo xtask bench its`: what the ITS and GIC handlers add to their ioctls, and what the ioctls
//! cost, over the number of devices and events that the guest maps.
//!
//! `bench-its` measures, with the monitor's own code, in a testbed whose clock counts instructions:
//! the figures are no hardware's latency, but they repeat to the last digits from boot to boot, on
//! any machine. The saves are held against those that were measured with another program.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::plot::{self, Series};
use crate::artifacts::{self, Counter};
use crate::kernel::{self, Arch, Package};
use crate::paths;
use crate::setup::{self, Purpose};
use crate::testbed::{Mode, STARTED_AGAIN, Testbed};

/// Devices and events of each that are measured. 57,344 events, 4096 × 14, is as many LPIs as there
/// are; with 4096 × 16 some events share one.
const SIZES: [(u64, u64); 15] = [
    (1, 1),
    (1, 16),
    (1, 32),
    (16, 1),
    (16, 16),
    (16, 32),
    (256, 1),
    (256, 16),
    (256, 32),
    (1024, 1),
    (1024, 16),
    (1024, 32),
    (4096, 1),
    (4096, 14),
    (4096, 16),
];

/// What a save took on Linux 6.12.107, measured with a program of 300 lines that knows nothing but the
/// ioctls: devices, events of each, instructions.
const KNOWN_SAVES: [(u64, u64, u64); 5] = [
    (1, 1, 3_100),
    (16, 16, 115_800),
    (256, 16, 1_830_900),
    (1024, 16, 7_340_000),
    (4096, 16, 29_400_000),
];

/// How far from it a save may be. Debian's next kernel, 6.12.117, takes 3.2 % more for 16 × 16.
const TOLERANCE: f64 = 0.05;

/// What a handler may add to its ioctl, instructions: at its least, as interrupts and the steps of the
/// clock, 16 each, only blur it.
const ADDED_MAX: u64 = 1000;

/// Arguments of `cargo xtask bench its`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The testbed's kernel. Saves are only known for 6.12.
    #[arg(long, value_enum, default_value = "6.12")]
    kernel: kernel::Series,
    /// Where `its.json` and `its.svg` go.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Stops of each guest.
    #[arg(long, default_value_t = 9)]
    stops: u32,
    /// Machines into which each guest is restored.
    #[arg(long, default_value_t = 3)]
    restores: u32,
    /// vCPUs of the guest.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Give up after this many seconds.
    #[arg(long, default_value_t = 1800)]
    timeout: u64,
}

/// Runs the benchmark, prints the table, writes the files; 1 when a figure is out of bounds.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    setup::ensure(&[Purpose::Gate])?;
    let points = measure(arguments)?;
    print(&points);
    let mut problems = too_much_added(&points);
    if arguments.kernel == kernel::Series::V6_12 && arguments.cpus == 1 {
        problems.extend(unlike_known(&points));
    }

    let out = arguments.out.clone();
    let out = out.unwrap_or_else(|| paths::target().join("bench"));
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    write_json(arguments, &points, &problems, out.join("its.json"))?;
    write_plot(&points, out.join("its.svg"))?;

    for problem in &problems {
        println!("FAIL: {problem}");
    }
    Ok(u8::from(!problems.is_empty()))
}

/// What one size took; see `tests/src/bin/bench-its.rs` for the names.
struct Point {
    devices: u64,
    events: u64,
    raw: Value,
}

impl Point {
    fn parse(line: &str) -> Result<Self> {
        let raw: Value = serde_json::from_str(line).context("bench-its printed broken JSON")?;
        let number = |key: &str| {
            raw[key]
                .as_u64()
                .with_context(|| format!("no {key}: {raw}"))
        };
        let (devices, events) = (number("devices")?, number("events")?);
        Ok(Point {
            devices,
            events,
            raw,
        })
    }

    /// A figure, by a JSON pointer.
    fn get(&self, pointer: &str) -> u64 {
        self.raw
            .pointer(pointer)
            .and_then(Value::as_u64)
            .unwrap_or_default()
    }

    fn mapped(&self) -> u64 {
        self.devices * self.events
    }
}

fn measure(arguments: &Arguments) -> Result<Vec<Point>> {
    let plan = Plan {
        kernel: arguments.kernel,
        sizes: &SIZES,
        stops: arguments.stops,
        restores: arguments.restores,
        cpus: arguments.cpus,
        rehearse: false,
        slower: None,
        timeout: Duration::from_secs(arguments.timeout),
    };
    let lines = plan.run(&artifacts::build_counter()?, "bench")?;
    lines.iter().map(|line| Point::parse(line)).collect()
}

/// What `bench-its` is to measure in counting mode.
pub(crate) struct Plan<'a> {
    /// The testbed's kernel.
    pub(crate) kernel: kernel::Series,
    /// Devices, and events of each.
    pub(crate) sizes: &'a [(u64, u64)],
    /// Stops of each guest.
    pub(crate) stops: u32,
    /// Machines into which each guest is restored.
    pub(crate) restores: u32,
    /// vCPUs of the guest.
    pub(crate) cpus: u32,
    /// Whether machines rehearse before a guest is restored into them.
    pub(crate) rehearse: bool,
    /// By how many instructions to slow the ITS's handler down.
    pub(crate) slower: Option<u32>,
    /// When to give up.
    pub(crate) timeout: Duration,
}

impl Plan<'_> {
    /// Boots the testbed called `name`, and measures: one line of JSON a size.
    pub(crate) fn run(&self, counter: &Counter, name: &str) -> Result<Vec<String>> {
        let kernel = kernel::Kernel::find(Package::testbed(self.kernel, Arch::Aarch64))?;
        let testbed = Testbed::new(kernel, name)
            .mode(Mode::Counting)
            .file(&counter.program, "/bin/bench-its")
            .file(&counter.guest, "/bin/blackout-guest")
            .env("BLACKOUT_GUEST", "/bin/blackout-guest");
        let numbers = [
            ("--stops", Some(self.stops)),
            ("--restores", Some(self.restores)),
            ("--cpus", Some(self.cpus)),
            ("--slower", self.slower),
        ];
        let mut program = vec!["/bin/bench-its".to_owned()];
        program.extend(
            numbers
                .into_iter()
                .filter_map(|(key, n)| Some([key.to_owned(), n?.to_string()]))
                .flatten(),
        );
        program.extend(self.rehearse.then(|| "--rehearse".to_owned()));
        let sizes = self.sizes.iter();
        program.extend(sizes.map(|(devices, events)| format!("{devices}x{events}")));
        let program: Vec<_> = program.iter().map(String::as_str).collect();

        eprintln!("booting the testbed, whose clock counts instructions");
        let mut lines = Vec::new();
        let finished = testbed.run(&program, self.timeout, |line| {
            if line == STARTED_AGAIN {
                // What was measured before the hang is measured again.
                lines.clear();
            } else if line.starts_with('{') {
                lines.push(line.to_owned());
                eprintln!("{} of {} sizes measured", lines.len(), self.sizes.len());
            } else {
                eprintln!("{line}");
            }
        })?;
        if finished.status != 0 {
            bail!("bench-its ended with status {}", finished.status);
        }
        Ok(lines)
    }
}

/// The operations: what they are called, and where their figures are in a [`Point`].
const SAVE: (&str, &str) = ("ITS save", "/its");
const PENDING: (&str, &str) = ("GIC pending", "/gicv3");

fn print(points: &[Point]) {
    println!("instructions (counting mode); first call / median");
    println!(
        "{:>7} {:>6}  {:>23} {:>6}  {:>23} {:>6}  {:>25}",
        "devices", "events", "ITS save ioctl", "added", "GIC pending ioctl", "added", "ITS restore"
    );
    for point in points {
        let pair = |at: &str| {
            let (first, median) = (format!("{at}/first"), format!("{at}/median"));
            format!("{:>11} / {:>9}", point.get(&first), point.get(&median))
        };
        println!(
            "{:>7} {:>6}  {} {:>6}  {} {:>6}  {:>25}",
            point.devices,
            point.events,
            pair("/its/ioctl"),
            point.get("/its/added/median"),
            pair("/gicv3/ioctl"),
            point.get("/gicv3/added/median"),
            pair("/its_restore_tables"),
        );
    }
}

fn too_much_added(points: &[Point]) -> Vec<String> {
    let mut problems = Vec::new();
    for point in points {
        for (name, at) in [SAVE, PENDING] {
            let added = point.get(&format!("{at}/added/min"));
            if added >= ADDED_MAX {
                problems.push(format!(
                    "{name}, {} x {}: the handler adds {added} instructions, {ADDED_MAX} is too many",
                    point.devices, point.events
                ));
            }
        }
    }
    problems
}

/// Saves whose ioctl costs something else than it is known to; prints the comparison.
fn unlike_known(points: &[Point]) -> Vec<String> {
    let mut problems = Vec::new();
    println!("ITS save ioctl against what it is known to take:");
    for (devices, events, known) in KNOWN_SAVES {
        let found = points
            .iter()
            .find(|point| (point.devices, point.events) == (devices, events))
            .map_or(0, |point| point.get("/its/ioctl/median"));
        let off = found as f64 / known as f64 - 1.0;
        let text = format!(
            "{devices:>7} {events:>6}  {found:>11}, known {known:>10}, {:+.1} %",
            off * 100.0
        );
        println!("{text}");
        if off.abs() > TOLERANCE {
            problems.push(format!("ITS save: {}", text.trim_start()));
        }
    }
    problems
}

fn write_json(
    arguments: &Arguments,
    points: &[Point],
    problems: &[String],
    file: PathBuf,
) -> Result<()> {
    let report = json!({
        "schema": "blackout.bench-its/1",
        "unit": "instructions",
        "kernel": arguments.kernel.to_string(),
        "points": points.iter().map(|point| &point.raw).collect::<Vec<_>>(),
        "problems": problems,
    });
    fs::write(&file, serde_json::to_vec_pretty(&report)?)
        .with_context(|| format!("cannot write {}", file.display()))?;
    println!("figures: {}", file.display());
    Ok(())
}

fn write_plot(points: &[Point], file: PathBuf) -> Result<()> {
    let series = |name: &str, at: &str| Series {
        name: name.to_owned(),
        points: points
            .iter()
            .map(|point| (point.mapped(), point.get(at)))
            .collect(),
    };
    plot::write(
        &file,
        "Instructions of the ITS's part of a blackout",
        &[
            series("ITS restore tables", "/its_restore_tables/median"),
            series("ITS save tables", "/its/ioctl/median"),
            series("GIC save pending tables", "/gicv3/ioctl/median"),
            series("added by the ITS handler", "/its/added/median"),
        ],
    )?;
    println!("plot: {}", file.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(devices: u64, events: u64, ioctl: u64, added: u64) -> Point {
        let raw = json!({
            "devices": devices,
            "events": events,
            "its": { "ioctl": { "median": ioctl }, "added": { "min": added } },
        });
        Point::parse(&raw.to_string()).unwrap()
    }

    #[test]
    fn a_save_may_be_5_percent_off() {
        let known = |devices, events| {
            let all = KNOWN_SAVES.iter();
            let mut all = all.filter(|known| (known.0, known.1) == (devices, events));
            all.next().unwrap().2
        };
        let points = |factor: f64| -> Vec<Point> {
            let all = KNOWN_SAVES.iter();
            all.map(|&(d, e, _)| point(d, e, (known(d, e) as f64 * factor) as u64, 0))
                .collect()
        };
        assert_eq!(unlike_known(&points(1.049)).len(), 0);
        assert_eq!(unlike_known(&points(0.951)).len(), 0);
        assert_eq!(unlike_known(&points(1.051)).len(), KNOWN_SAVES.len());
        assert_eq!(unlike_known(&[]).len(), KNOWN_SAVES.len());
    }

    #[test]
    fn a_handler_must_add_less_than_the_limit() {
        let points = [point(1, 1, 0, ADDED_MAX - 1), point(1, 2, 0, ADDED_MAX)];
        let problems = too_much_added(&points);
        assert_eq!(problems.len(), 1);
        assert!(problems[0].contains("1 x 2"));
    }
}
