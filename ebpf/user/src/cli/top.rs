//! `blackout top`.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};

use super::Outcome;
use crate::capture::sites::Pattern;
use crate::capture::{self, Backend, Options, Recorder, object};
use crate::recording::{Frame, Reader};
use crate::top::model::{Model, Own};
use crate::top::screen;

/// Show what the VMs of this host do: exits, ioctls by cost, migrations as they go on
///
/// For each migration that its monitor's probes tell of: what it does now, how much the guest writes and
/// how much is sent of it, how long the last RAM would take if the guest were stopped now, and the
/// downtime. The first line is what watching costs. Where standard output is no terminal, one screen is
/// printed, of one second or of the whole recording.
///
/// Takes the rights of `record`; with --replay none.
#[derive(Debug, clap::Args)]
#[command(after_help = super::EXIT_CODES)]
pub(super) struct Args {
    /// Only this process; may be repeated. By default every process that has a VM
    #[arg(short, long = "pid", value_name = "PID", conflicts_with = "replay")]
    pids: Vec<u32>,

    /// Show a recording, as if it happened now
    #[arg(long, value_name = "FILE")]
    replay: Option<PathBuf>,

    /// How much faster than it happened
    #[arg(
        long,
        default_value_t = 1.0,
        value_name = "FACTOR",
        requires = "replay"
    )]
    speed: f64,

    /// An eBPF object file to use in place of the one that was built in
    #[arg(long, value_name = "FILE")]
    bpf_object: Option<PathBuf>,
}

/// Rates are of an interval of this length.
const INTERVAL: Duration = Duration::from_secs(1);
/// Between two looks at the keyboard, and two screens.
const GLANCE: Duration = Duration::from_millis(100);
/// A screen where there is no terminal.
const WIDTH: u16 = 120;
const HEIGHT: u16 = 40;

pub(super) fn run(args: &Args) -> anyhow::Result<Outcome> {
    if !(args.speed.is_finite() && args.speed > 0.0) {
        bail!("--speed {}: give a number above 0", args.speed);
    }
    let on_terminal = io::stdout().is_terminal();
    let mut source = match &args.replay {
        Some(file) => Source::Recording(Box::new(Replay::open(file, args.speed)?)),
        None => Source::Host(Box::new(Host::start(args)?)),
    };
    let mut model = Model::default();
    if !on_terminal {
        source.run_through(&mut model)?;
        let text = screen::text(&model, WIDTH, HEIGHT);
        io::stdout().lock().write_all(text.as_bytes())?;
        return Ok(Outcome::Done);
    }
    let mut terminal = ratatui::try_init().context("cannot use this terminal")?;
    let shown = show(&mut terminal, &mut source, &mut model);
    ratatui::restore();
    shown.map(|()| Outcome::Done)
}

fn show(
    terminal: &mut DefaultTerminal,
    source: &mut Source,
    model: &mut Model,
) -> anyhow::Result<()> {
    loop {
        source.turn(model)?;
        terminal.draw(|frame| screen::draw(frame, model))?;
        if event::poll(GLANCE)?
            && let Event::Key(key) = event::read()?
        {
            let interrupt = key.modifiers.contains(KeyModifiers::CONTROL);
            match key.code {
                KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                KeyCode::Char('c') if interrupt => return Ok(()),
                _ => {}
            }
        }
    }
}

/// Where frames come from.
enum Source {
    Host(Box<Host>),
    Recording(Box<Replay>),
}

impl Source {
    fn turn(&mut self, model: &mut Model) -> anyhow::Result<()> {
        match self {
            Self::Host(host) => host.turn(model),
            Self::Recording(replay) => replay.turn(model),
        }
    }

    /// All of a recording, or one interval of a host.
    fn run_through(&mut self, model: &mut Model) -> anyhow::Result<()> {
        match self {
            Self::Host(host) => {
                let end = Instant::now() + INTERVAL * 2;
                while Instant::now() < end {
                    host.turn(model)?;
                }
                model.forget(is_alive);
            }
            Self::Recording(replay) => {
                replay.speed = f64::INFINITY;
                replay.turn(model)?;
            }
        }
        Ok(())
    }
}

/// This host.
struct Host {
    recorder: Recorder,
    ticked: Instant,
    seen: capture::Totals,
    bpf_ns: Option<u64>,
}

impl Host {
    fn start(args: &Args) -> anyhow::Result<Self> {
        let object = object(args.bpf_object.as_deref())?;
        let options = Options {
            gap_ns: 200_000,
            all: args.pids.is_empty(),
            buffer: 4 << 20,
            backend: Backend::default(),
        };
        let nowhere = Path::new("/dev/null");
        let mut recorder = Recorder::start(&object, options, Pattern::understood(), nowhere)?;
        for pid in &args.pids {
            recorder
                .add(*pid)
                .with_context(|| format!("cannot look at process {pid}"))?;
        }
        if args.pids.is_empty() {
            for pid in capture::with_vm() {
                // One that has ended meanwhile is no reason to show none.
                let _ = recorder.add(pid);
            }
        }
        recorder.give_up_rights(false)?;
        Ok(Self {
            seen: recorder.totals(),
            bpf_ns: recorder.bpf_ns(),
            recorder,
            ticked: Instant::now(),
        })
    }

    fn turn(&mut self, model: &mut Model) -> anyhow::Result<()> {
        if model.header.hostname.is_empty() {
            let hostname = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
            hostname.trim_end().clone_into(&mut model.header.hostname);
            for frame in self.recorder.known() {
                model.see(&frame);
            }
        }
        self.recorder.turn_seeing(&mut |frame, _| {
            model.see(frame);
        })?;
        let elapsed = self.ticked.elapsed();
        if elapsed < INTERVAL {
            return Ok(());
        }
        self.ticked = Instant::now();
        for edges in self.recorder.vcpus() {
            model.see(&Frame::VcpuEdges(edges));
        }
        for frame in self.recorder.known() {
            model.see(&frame);
        }
        let totals = self.recorder.totals();
        let share = |now: u64, before: u64| {
            now.saturating_sub(before) as f64 / elapsed.as_nanos().max(1) as f64
        };
        let bpf_ns = self.recorder.bpf_ns();
        model.own = Own {
            events: share(totals.events, self.seen.events) * 1e9,
            cpu: Some(share(totals.cpu_ns, self.seen.cpu_ns)),
            bpf: bpf_ns
                .zip(self.bpf_ns)
                .map(|(now, before)| share(now, before)),
        };
        model.lost = totals.lost;
        (self.seen, self.bpf_ns) = (totals, bpf_ns);
        model.tick(capture::monotonic());
        model.forget(is_alive);
        Ok(())
    }
}

fn is_alive(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

/// A recording that is played.
struct Replay {
    reader: Reader<fs::File>,
    speed: f64,
    begun: Instant,
    /// The recording's time at which it began, and at which the interval did.
    start_ns: Option<u64>,
    ticked_ns: u64,
    events: u64,
}

impl Replay {
    fn open(file: &Path, speed: f64) -> anyhow::Result<Self> {
        Ok(Self {
            reader: Reader::open(file)?,
            speed,
            begun: Instant::now(),
            start_ns: None,
            ticked_ns: 0,
            events: 0,
        })
    }

    /// Plays what has happened by now.
    fn turn(&mut self, model: &mut Model) -> anyhow::Result<()> {
        let interval = u64::try_from(INTERVAL.as_nanos())?;
        let played = self.begun.elapsed().as_secs_f64() * 1e9 * self.speed;
        let by_now = |start: u64| start.saturating_add(played as u64);
        while self
            .start_ns
            .is_none_or(|start| model.now_ns <= by_now(start))
        {
            let Some(frame) = self.reader.next().transpose()? else {
                if model.now_ns > self.ticked_ns {
                    self.tick(model, model.now_ns);
                }
                return Ok(());
            };
            self.events += 1;
            let Some(at) = model.see(&frame) else {
                continue;
            };
            let start = *self.start_ns.get_or_insert(at);
            self.ticked_ns = self.ticked_ns.max(start);
            if at.saturating_sub(self.ticked_ns) >= interval {
                self.tick(model, at);
            }
        }
        Ok(())
    }

    fn tick(&mut self, model: &mut Model, at: u64) {
        let ns = at.saturating_sub(self.ticked_ns).max(1);
        model.own.events = std::mem::take(&mut self.events) as f64 * 1e9 / ns as f64;
        model.tick(at);
        self.ticked_ns = at;
    }
}
