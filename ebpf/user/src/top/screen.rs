//! The screen: migrations above, then VMs, then ioctls, and what watching costs in the first line.

use ratatui::Frame;
use ratatui::backend::TestBackend;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Block, Row, Table};

use super::migration::Migration;
use super::model::{Calls, Machine, Model};
use crate::analysis::describe::printable;
use crate::report::units::time;

/// Draws all of it.
pub fn draw(frame: &mut Frame<'_>, model: &Model) {
    let migrations = u16::try_from(model.migrations.len()).unwrap_or(u16::MAX);
    let machines = u16::try_from(model.machines.len()).unwrap_or(u16::MAX);
    let [head, first, second, third, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(migrations.clamp(1, 8).saturating_add(3)),
        Constraint::Length(machines.clamp(1, 12).saturating_add(3)),
        Constraint::Min(4),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(Line::from(summary(model)), head);
    draw_migrations(frame, model, first);
    draw_machines(frame, model, second);
    draw_ioctls(frame, model, third);
    let keys = Line::from("q quits").style(Modifier::DIM);
    frame.render_widget(keys, foot);
}

/// What [`draw`] draws, as text, for where there is no terminal.
pub fn text(model: &Model, width: u16, height: u16) -> String {
    let Ok(mut terminal) = ratatui::Terminal::new(TestBackend::new(width, height));
    let Ok(_) = terminal.draw(|frame| draw(frame, model));
    let mut text = String::new();
    let buffer = terminal.backend().buffer();
    for y in 0..height {
        let cells = (0..width).filter_map(|x| buffer.cell((x, y)));
        let line: String = cells.map(ratatui::buffer::Cell::symbol).collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn summary(model: &Model) -> String {
    let own = &model.own;
    let share = |name: &str, share: Option<f64>| match share {
        Some(share) => format!(", {name} {:.2} % of a CPU", share * 100.0),
        None => String::new(),
    };
    format!(
        "blackout · {} · {:.0} events/s, {} lost{}{}",
        printable(&model.header.hostname),
        own.events,
        model.lost,
        share("recorder", own.cpu),
        share("eBPF", own.bpf),
    )
}

fn table<'a>(
    title: &'a str,
    head: &[&'a str],
    rows: impl Iterator<Item = Vec<String>>,
    widths: &[Constraint],
) -> Table<'a> {
    let bold = Style::new().add_modifier(Modifier::BOLD);
    Table::new(rows.map(Row::new), widths.iter().copied())
        .header(Row::new(head.iter().copied()).style(bold))
        .block(Block::bordered().title(title))
}

fn draw_migrations(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let rows = model.migrations.iter().rev();
    let rows = rows.map(|migration| migration_row(model, migration));
    let head = [
        "pid",
        "guest",
        "phase",
        "for",
        "written/s",
        "sent/s",
        "last RAM",
        "downtime",
    ];
    let widths = [9, 7, 28, 11, 11, 11, 11, 11].map(Constraint::Length);
    frame.render_widget(table("Migrations", &head, rows, &widths), area);
}

fn migration_row(model: &Model, migration: &Migration) -> Vec<String> {
    let end = migration.ended_ns.unwrap_or(model.now_ns);
    let downtime = match (migration.downtime_ns, migration.stopped_ns) {
        (Some(ns), _) => time(ns),
        // It goes on.
        (None, Some(stopped)) if migration.ended_ns.is_none() => {
            format!("> {}", time(model.now_ns.saturating_sub(stopped)))
        }
        _ => String::new(),
    };
    vec![
        migration.pid.to_string(),
        if migration.incoming { "comes" } else { "goes" }.to_owned(),
        printable(&migration.phase),
        time(end.saturating_sub(migration.since_ns)),
        migration.dirty_rate().map_or_else(String::new, bytes),
        migration.bandwidth().map_or_else(String::new, bytes),
        migration.predicted_ns().map_or_else(String::new, time),
        downtime,
    ]
}

fn draw_machines(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let mut machines: Vec<_> = model.machines.iter().collect();
    machines.sort_by(|one, other| other.1.exits().total_cmp(&one.1.exits()));
    let rows = machines
        .into_iter()
        .map(|(pid, machine)| machine_row(model, *pid, machine));
    let head = [
        "pid",
        "name",
        "vCPUs",
        "out",
        "exits/s",
        "ioctls/s",
        "exits/s of each",
        "",
    ];
    let widths = [9, 16, 6, 4, 10, 10, 30, 20].map(Constraint::Length);
    frame.render_widget(table("VMs", &head, rows, &widths), area);
}

fn machine_row(model: &Model, pid: u32, machine: &Machine) -> Vec<String> {
    let out = machine.vcpus.values().filter(|vcpu| vcpu.out).count();
    let each = machine
        .vcpus
        .values()
        .map(|vcpu| format!("{:.0}", vcpu.exits));
    vec![
        pid.to_string(),
        printable(&machine.name),
        machine.vcpus.len().to_string(),
        out.to_string(),
        format!("{:.0}", machine.exits()),
        format!("{:.0}", machine.ioctls),
        each.collect::<Vec<_>>().join(" "),
        match machine.reads_dirty_log(model.now_ns) {
            true => "reads the dirty log".to_owned(),
            false => String::new(),
        },
    ]
}

fn draw_ioctls(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let mut ioctls: Vec<(&String, &Calls)> = model.ioctls.iter().collect();
    let cost = |calls: &Calls| (calls.share, calls.total_ns);
    ioctls.sort_by(|one, other| {
        let (one, other) = (cost(one.1), cost(other.1));
        other.0.total_cmp(&one.0).then(other.1.cmp(&one.1))
    });
    let rows = ioctls.into_iter().map(|(name, calls)| {
        vec![
            printable(name),
            format!("{:.0}", calls.rate),
            format!("{:.2} %", calls.share * 100.0),
            calls.count.to_string(),
            time(calls.total_ns),
            time(calls.total_ns / calls.count.max(1)),
            time(calls.max_ns),
        ]
    });
    let head = [
        "ioctl", "calls/s", "time", "calls", "took", "mean", "longest",
    ];
    let widths = [34, 9, 9, 10, 11, 11, 11].map(Constraint::Length);
    frame.render_widget(table("KVM's ioctls", &head, rows, &widths), area);
}

/// Bytes a second as a person reads them.
fn bytes(value: f64) -> String {
    let mut units = ["B", "KiB", "MiB", "GiB"].into_iter();
    let mut unit = units.next().unwrap_or_default();
    let mut value = value;
    for next in units {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recording::{Frame as Recorded, Ioctl, Process, VcpuEdges};

    #[test]
    fn every_part_is_on_the_screen() {
        let mut model = Model::default();
        let pid = 4711;
        let (comm, exe) = ("blackout-vmm".to_owned(), String::new());
        model.see(&Recorded::Process(Process { pid, comm, exe }));
        model.see(&Recorded::Lost {
            since_ns: 0,
            at_ns: 1,
            count: 5,
        });
        let edges = |runs| {
            let tid = 1;
            Recorded::VcpuEdges(VcpuEdges {
                pid,
                tid,
                runs,
                ..VcpuEdges::default()
            })
        };
        model.see(&edges(0));
        model.tick(1_000_000_000);
        model.see(&edges(30_000));
        model.see(&Recorded::Ioctl(Ioctl {
            pid,
            enter_ns: 1_000_000_000,
            exit_ns: 1_500_000_000,
            cmd: 0x4010_ae42,
            ..Ioctl::default()
        }));
        model.tick(2_000_000_000);
        let text = text(&model, 110, 24);
        for part in [
            "5 lost",
            "Migrations",
            "VMs",
            "4711",
            "blackout-vmm",
            "30000",
            "KVM_GET_DIRTY_LOG",
            "reads the dirty log",
            "50.00 %",
            "500.000 ms",
            "q quits",
        ] {
            assert!(text.contains(part), "no {part} in\n{text}");
        }
    }

    #[test]
    fn a_small_terminal_and_an_evil_name_do_no_harm() {
        let mut model = Model::default();
        let (comm, exe) = ("\x1b[2Jevil\n".to_owned(), String::new());
        model.see(&Recorded::Process(Process { pid: 1, comm, exe }));
        assert!(!text(&model, 100, 20).contains('\x1b'));
        text(&model, 3, 2);
        text(&model, 1, 1);
    }

    #[test]
    fn bytes_have_a_unit() {
        assert_eq!(bytes(512.0), "512.0 B");
        assert_eq!(bytes(3.0 * 1024.0 * 1024.0), "3.0 MiB");
    }
}
