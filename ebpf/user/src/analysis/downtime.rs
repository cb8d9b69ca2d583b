//! The one definition of downtime, blackout and explained. Production and CI use this code.
//!
//! * **downtime**: from the entry of `migration_stop_vm` on the source to the first KVM_RUN on the
//!   destination. If the migration failed after the stop, it ends where the source runs again. Of a
//!   monitor without probes, it begins with the first vCPU's last return from KVM_RUN.
//! * **blackout**: the guest-dark part of it: from the last vCPU's last exit from guest code on the
//!   source to the first entry on the destination (or, again, the source). Per vCPU too.
//! * **explained**: the share of the downtime that is covered by spans of either side that do work
//!   ([`Nature::Work`]), and by messages under way whose both ends were seen; of a monitor without
//!   probes, by its KVM ioctls. A span that waits for
//!   the other side explains nothing, and neither does a layer that only calls the next.
//! * **gap**: what is left, each with its place.

#[cfg(test)]
mod tests;

use blackout_abi::Nature;

use super::describe;
use super::party::{Party, Placed, Side, Vcpu};
use super::spans::{Point, Span};
use super::thread::Thread;
use super::wire::Segment;
use crate::foreign;

/// Spans that are the migration itself, or a client's command: that one of them is open says
/// nothing of where the time goes, even if nothing was seen inside.
pub const WHOLES: [&str; 4] = [
    "qmp_command",
    "migrate",
    "migrate_incoming",
    "migration_thread",
];

/// So many threads are looked at, for all gaps together, to tell what a gap is within. Only a damaged
/// recording has more, and then the last gaps lack it.
const MOST_LOOKS: usize = 1 << 18;

/// How long the guest stood still, and why. Times are ns on the migration's axis.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Downtime {
    /// Its bounds; `None` if the VM was not stopped, or if one end was not seen.
    pub bounds: Option<Bounds>,
    /// When the stop began, if it did.
    pub stop_ns: Option<i64>,
    /// The downtime as the source alone saw it (`downtime_end`), which includes the way back of
    /// the destination's answer; ns.
    pub source_saw_ns: Option<u64>,
    /// The guest-dark part.
    pub blackout: Option<(i64, i64)>,
    /// Each vCPU's own blackout.
    pub vcpus: Vec<VcpuBlackout>,
    /// The explained share, from 0 to 1.
    pub explained: Option<f64>,
    /// What is not explained, in order.
    pub gaps: Vec<Gap>,
}

/// A downtime's bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// The entry of `migration_stop_vm`.
    pub start_ns: i64,
    /// The first KVM_RUN after it.
    pub end_ns: i64,
    /// Where that was.
    pub resumed: Side,
}

impl Bounds {
    /// The downtime, ns.
    pub fn duration_ns(&self) -> u64 {
        length(self.start_ns, self.end_ns)
    }

    /// How much of `start..end` lies inside, ns.
    pub fn overlap_ns(&self, start_ns: i64, end_ns: i64) -> u64 {
        length(start_ns.max(self.start_ns), end_ns.min(self.end_ns))
    }

    /// The share of the downtime that `start..end` takes.
    pub fn share(&self, start_ns: i64, end_ns: i64) -> f64 {
        match self.duration_ns() {
            0 => 0.0,
            whole => self.overlap_ns(start_ns, end_ns) as f64 / whole as f64,
        }
    }
}

/// One vCPU's blackout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuBlackout {
    /// Its index.
    pub index: u64,
    /// Its last exit on the source, ns.
    pub start_ns: i64,
    /// Its first entry on the side that runs on, ns.
    pub end_ns: i64,
}

/// A part of the downtime that nothing explains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gap {
    /// Its begin, ns.
    pub start_ns: i64,
    /// Its end, ns.
    pub end_ns: i64,
    /// What ended where it begins.
    pub after: String,
    /// What begins where it ends.
    pub before: String,
    /// The innermost span that was open for at least half of it, whose own work it then is;
    /// `None` between spans.
    pub within: Option<String>,
}

impl Gap {
    /// How long it is, ns.
    pub fn duration_ns(&self) -> u64 {
        length(self.start_ns, self.end_ns)
    }
}

/// Measures the downtime of a migration. Either side may be missing.
pub fn measure<'p>(
    source: Option<&'p Party<'p>>,
    destination: Option<&'p Party<'p>>,
    wire: &[Segment],
) -> Downtime {
    let Some(source) = source else {
        return Downtime::default();
    };
    // A migration that stops twice, because its first switchover was called off, is measured at
    // the stop that counted: the last.
    let stops = source.spans_of("migration_stop_vm");
    let Some(stop_ns) = stops.map(|span| span.start_ns).max() else {
        return Downtime::default();
    };
    let source_saw_ns = source
        .points_of("downtime_end")
        .filter(|point| point.start_ns >= stop_ns)
        .find_map(|point| point.what.args.u64("ns"));
    let mut downtime = Downtime {
        stop_ns: Some(stop_ns),
        source_saw_ns,
        ..Downtime::default()
    };

    let first = |party: Option<&'p Party<'p>>| {
        let party = party?;
        Some((entries(party, stop_ns).first()?.1, party))
    };
    // After a completed migration only the destination's run ends the downtime: if the source runs
    // as well, somebody has started a second copy.
    let stayed = (!completed(source)).then_some(source);
    let resumed = first(destination).or_else(|| first(stayed));
    let Some((end_ns, on)) = resumed else {
        return downtime;
    };
    downtime.bounds = Some(Bounds {
        start_ns: stop_ns,
        end_ns,
        resumed: on.side,
    });
    downtime.fill(source, destination, on, wire);
    downtime
}

/// Measures the downtime of a migration of another monitor: from where a probe of its own says that
/// the stop begins, or else from the first vCPU's last return from KVM_RUN on the source, to the
/// first KVM_RUN on the destination. Without probes, what the monitor did before it got the first
/// vCPU out, and between two ioctls, is not to be seen.
pub fn measure_by_kernel<'p>(source: &'p Party<'p>, destination: &'p Party<'p>) -> Downtime {
    let mut downtime = Downtime::default();
    let Some((_, end_ns)) = entries(destination, i64::MIN).first().copied() else {
        return downtime;
    };
    let vcpus = source.vcpus.iter();
    let Some(stop_ns) = vcpus.filter_map(|vcpu| exit(vcpu, i64::MIN, end_ns)).min() else {
        return downtime;
    };
    let told = source.points_of(foreign::STOP.0).filter(|point| {
        point.start_ns <= stop_ns && point.what.args.str("checkpoint") == Some(foreign::STOP.1)
    });
    let stop_ns = told.map(|point| point.start_ns).max().unwrap_or(stop_ns);
    downtime.stop_ns = Some(stop_ns);
    downtime.bounds = Some(Bounds {
        start_ns: stop_ns,
        end_ns,
        resumed: destination.side,
    });
    downtime.fill(source, Some(destination), destination, &[]);
    downtime
}

impl Downtime {
    /// What follows from the bounds. The guest went `on` there.
    fn fill(
        &mut self,
        source: &Party<'_>,
        destination: Option<&Party<'_>>,
        on: &Party<'_>,
        wire: &[Segment],
    ) {
        let Some(bounds) = self.bounds else { return };
        let Bounds {
            start_ns, end_ns, ..
        } = bounds;
        // KVM's own work at either edge of KVM_RUN belongs to the blackout, not to the guest.
        let exits = exits(source, start_ns, end_ns);
        let entries = guest_entries(on, start_ns);
        let light = entries.iter().map(|(_, entry)| *entry).min();
        let dark = exits.iter().map(|(_, exit)| *exit).max();
        self.blackout = dark.zip(light);
        self.vcpus = entries
            .into_iter()
            .filter_map(|(index, entry)| {
                let index = index?;
                let exit = exits.iter().find(|(other, _)| *other == Some(index))?.1;
                Some(VcpuBlackout {
                    index,
                    start_ns: exit,
                    end_ns: entry,
                })
            })
            .collect();
        self.vcpus.sort_by_key(|vcpu| vcpu.index);
        (self.explained, self.gaps) = explain(bounds, source, destination, wire);
    }
}

fn completed(source: &Party<'_>) -> bool {
    let mut said = source
        .spans_of("migrate")
        .filter_map(|span| span.what.end.as_ref()?.str("status"));
    said.any(|status| status == "completed")
}

/// Whether the span explains the time that it takes.
fn explains(span: &Span) -> bool {
    span.meaning.nature == Nature::Work
}

/// When each vCPU of `party` first ran after the stop: the earliest first. A vCPU that did not run
/// is absent.
fn entries(party: &Party<'_>, stop_ns: i64) -> Vec<(Option<u64>, i64)> {
    let mut entries: Vec<_> = party
        .vcpus
        .iter()
        .filter_map(|vcpu| Some((vcpu.index, entry(vcpu, stop_ns)?)))
        .collect();
    entries.sort_by_key(|(_, at)| *at);
    entries
}

/// As [`entries`], but when each entered guest code, where the kernel told.
fn guest_entries(party: &Party<'_>, stop_ns: i64) -> Vec<(Option<u64>, i64)> {
    let vcpus = party.vcpus.iter();
    vcpus
        .filter_map(|vcpu| Some((vcpu.index, entered(vcpu, entry(vcpu, stop_ns)?))))
        .collect()
}

/// When guest code was entered, at or after the call of KVM_RUN at `entry`. An entry behind another
/// stay outside is not this call's.
fn entered(vcpu: &Vcpu, entry: i64) -> i64 {
    let until = vcpu
        .gaps
        .iter()
        .map(|(exit, _)| *exit)
        .find(|exit| *exit > entry);
    let after = vcpu
        .entered
        .iter()
        .copied()
        .filter(|entered| *entered >= entry);
    after
        .min()
        .filter(|entered| until.is_none_or(|until| *entered <= until))
        .unwrap_or(entry)
}

/// When guest code was left, at or before the return of KVM_RUN at `exit`. What was left before
/// another stay outside is not this call's.
fn left(vcpu: &Vcpu, exit: i64) -> i64 {
    let since = vcpu
        .gaps
        .iter()
        .map(|(_, enter)| *enter)
        .filter(|enter| *enter <= exit)
        .max();
    let before = vcpu.left.iter().copied().filter(|left| *left <= exit);
    before
        .max()
        .filter(|left| since.is_none_or(|since| *left >= since))
        .unwrap_or(exit)
}

/// The ioctl's edge is nearer to the truth than the probe before it, so it is taken where it was
/// seen. But the probe tells which edge: monitors call KVM_RUN for other reasons too, to finish an
/// exit for one, and such a call comes before the probe.
fn entry(vcpu: &Vcpu, stop_ns: i64) -> Option<i64> {
    let first = vcpu.first_enter.filter(|enter| *enter >= stop_ns);
    let mut gaps = vcpu.gaps.iter().filter(|(_, enter)| *enter >= stop_ns);
    let Some(run) = vcpu.first_runs.iter().copied().find(|run| *run >= stop_ns) else {
        return first.or(gaps.next().map(|(_, enter)| *enter));
    };
    let around = gaps
        .find(|(exit, enter)| *exit <= run && run <= *enter)
        .map(|(_, enter)| *enter);
    Some(
        first
            .filter(|enter| *enter >= run)
            .or(around)
            .unwrap_or(run),
    )
}

/// When each vCPU of the source left guest code for the last time before `end_ns`.
fn exits(source: &Party<'_>, stop_ns: i64, end_ns: i64) -> Vec<(Option<u64>, i64)> {
    let vcpus = source.vcpus.iter();
    vcpus
        .filter_map(|vcpu| Some((vcpu.index, left(vcpu, exit(vcpu, stop_ns, end_ns)?))))
        .collect()
}

/// As with [`entry`], the probe tells which edge of the ioctl it was: here the one before it.
fn exit(vcpu: &Vcpu, stop_ns: i64, end_ns: i64) -> Option<i64> {
    let paused = vcpu.paused.iter().copied().find(|at| *at >= stop_ns);
    let until = paused.unwrap_or(end_ns);
    let last = vcpu.last_exit.filter(|exit| *exit <= until);
    let gaps = vcpu.gaps.iter();
    let around = gaps.filter(|(exit, enter)| *exit <= until && until <= *enter);
    let exits = last.into_iter().chain(around.map(|(exit, _)| *exit));
    exits.max().or(paused)
}

/// Something that explains a part of the downtime.
struct Cover {
    start_ns: i64,
    end_ns: i64,
    name: String,
}

fn explain(
    bounds: Bounds,
    source: &Party<'_>,
    destination: Option<&Party<'_>>,
    wire: &[Segment],
) -> (Option<f64>, Vec<Gap>) {
    let parties = [Some(source), destination];
    let spans = parties.iter().flatten().flat_map(|party| {
        party
            .spans
            .iter()
            .filter(|span| explains(span.what))
            .map(|span| span_cover(party.side, span))
    });
    // A monitor that says nothing of its stop, or less than ours does, is known by its ioctls.
    let ours = |party: &&&Party<'_>| party.spans.iter().any(|span| span.what.meaning.hop > 0);
    let silent = parties.iter().flatten().filter(|party| !ours(party));
    let ioctls = silent.flat_map(|party| {
        let covers = party.ioctls.iter();
        covers.map(|ioctl| Cover {
            start_ns: ioctl.start_ns,
            end_ns: ioctl.end_ns,
            name: format!("{} ({})", describe::ioctl(ioctl.what), party.side),
        })
    });
    let segments = wire.iter().map(|segment| Cover {
        start_ns: segment.sent_ns,
        end_ns: segment.received_ns,
        name: format!("{} ({})", segment.describe(), Side::Wire),
    });
    let inside = |cover: &Cover| cover.start_ns < bounds.end_ns && cover.end_ns > bounds.start_ns;
    let mut covers: Vec<_> = spans.chain(ioctls).chain(segments).filter(inside).collect();
    covers.sort_by_key(|cover| (cover.start_ns, cover.end_ns));

    let threads: Vec<_> = parties
        .iter()
        .flatten()
        .map(|party| at_work(party))
        .collect();
    let mut looks = MOST_LOOKS;
    let mut gap = |start_ns, end_ns, after: &str, before: String| {
        looks = looks.saturating_sub(threads.iter().map(Vec::len).sum());
        let range = Some((start_ns, end_ns)).filter(|_| looks > 0);
        let within = range.and_then(|range| within(&parties, &threads, range));
        Gap {
            start_ns,
            end_ns,
            after: after.to_owned(),
            before,
            within,
        }
    };
    let mut gaps = Vec::new();
    let mut until = bounds.start_ns;
    let begins_at = |point: &&Placed<'_, Point>| point.start_ns == bounds.start_ns;
    let stop = if source.spans_of("migration_stop_vm").next().is_some() {
        "migration_stop_vm began"
    } else if source
        .points_of(foreign::STOP.0)
        .any(|point| begins_at(&point))
    {
        foreign::STOP.1
    } else {
        "a vCPU's last KVM_RUN"
    };
    let mut after = format!("{stop} ({})", Side::Source);
    for cover in covers {
        if cover.start_ns > until {
            gaps.push(gap(until, cover.start_ns, &after, cover.name.clone()));
        }
        if cover.end_ns > until {
            (until, after) = (cover.end_ns, cover.name);
        }
    }
    if until < bounds.end_ns {
        gaps.push(gap(
            until,
            bounds.end_ns,
            &after,
            format!("KVM_RUN ({})", bounds.resumed),
        ));
    }
    let unexplained = gaps
        .iter()
        .fold(0u64, |sum, gap| sum.saturating_add(gap.duration_ns()));
    let whole = bounds.duration_ns();
    let explained = (whole > 0).then(|| 1.0 - unexplained as f64 / whole as f64);
    (explained, gaps)
}

/// The threads of a side that have spans in the migration.
fn at_work<'a>(party: &Party<'a>) -> Vec<&'a Thread> {
    let mut tids: Vec<_> = party.spans.iter().map(|span| span.tid).collect();
    tids.dedup();
    let threads = tids.iter().filter_map(|tid| party.process.threads.get(tid));
    threads.collect()
}

/// The innermost span of either side that was at work for at least half of the gap. Not for all of
/// it: a gap that lies in a span begins where something before that span ended.
fn within(
    parties: &[Option<&Party<'_>>],
    threads: &[Vec<&Thread>],
    (start_ns, end_ns): (i64, i64),
) -> Option<String> {
    // What is open for half of it is open in its middle.
    let half_ns = length(start_ns, end_ns).div_ceil(2);
    let middle_ns = start_ns.midpoint(end_ns);
    let around = |(party, threads): (&&Party<'_>, &Vec<&Thread>)| {
        let (side, place) = (party.side, party.place);
        let fits = |span: &&Span| {
            let (start, end) = (place.at(span.start_ns), place.at(span.end_ns));
            let works = span.meaning.nature != Nature::Wait && !WHOLES.contains(&span.name());
            works && length(start.max(start_ns), end.min(end_ns)) >= half_ns
        };
        let at = place.back(middle_ns);
        let innermost = threads
            .iter()
            .filter_map(|thread| thread.spans_at(at).find(fits));
        let innermost = innermost.min_by_key(|span| span.end_ns.saturating_sub(span.start_ns))?;
        let duration_ns = innermost.end_ns.saturating_sub(innermost.start_ns);
        Some((
            duration_ns,
            format!("{} ({side})", describe::span(innermost)),
        ))
    };
    let sides = parties.iter().flatten().zip(threads);
    sides.filter_map(around).min().map(|(_, name)| name)
}

fn span_cover(side: Side, span: &Placed<'_, Span>) -> Cover {
    let name = format!("{} ({side})", describe::span(span.what));
    Cover {
        start_ns: span.start_ns,
        end_ns: span.end_ns,
        name,
    }
}

fn length(start_ns: i64, end_ns: i64) -> u64 {
    u64::try_from(end_ns.saturating_sub(start_ns)).unwrap_or(0)
}
