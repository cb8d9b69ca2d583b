//! Finds the migrations in recordings and joins their two sides.
//!
//! A migration is a `migrate` span on the source and a `migrate_incoming` span on the destination
//! with the same id. One recording may hold both sides or one, and many migrations: back and forth
//! between processes, failed ones, ones that the recording cuts.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashSet};
use std::iter::successors;

use super::by_kernel;
use super::clock::{self, Clock};
use super::describe;
use super::downtime::{self, Downtime};
use super::its::{self, ItsOp};
use super::load::{Loaded, Process};
use super::loss;
use super::order;
use super::party::{Party, Place, Placed, Side};
use super::spans::{Point, Problem, Span};
use super::wire::{self, Segment};
use crate::recording::Ending;

/// How long after the answer to the QMP command a migration may begin and still be the one that
/// was asked for. 1 s, in ns.
const ASKED_NS: u64 = 1_000_000_000;

/// Spans that are a migration, on either side.
pub(super) const WHOLES: [&str; 2] = ["migrate", "migrate_incoming"];

/// How a migration was seen.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum View {
    /// By the monitor's probes, and KVM's ioctls beside them.
    Probes,
    /// By KVM's ioctls alone: the monitor has no probes.
    Kernel,
}

/// One migration, seen from one side or both. Times are ns since its start on the source's clock;
/// with only the destination recorded, since the connection was accepted there.
#[derive(Debug)]
pub struct Migration<'a> {
    /// How it was seen.
    pub view: View,
    /// The id that both sides know it by; `None` if it failed before one was agreed on.
    pub id: Option<u64>,
    /// `normal`, or the name of another mode; empty if the source was not recorded.
    pub mode: String,
    /// `completed`, `failed` or `cancelled`, as the monitor says; `unfinished` if it does not.
    pub status: String,
    /// What failed, and how.
    pub error: Option<String>,
    /// Where 0 of the axis is on the clock of [`Migration::reference`], ns.
    pub origin_ns: i64,
    /// When its last span ended.
    pub end_ns: i64,
    /// How the destination's clock relates to the source's.
    pub clock: Clock,
    /// The source.
    pub source: Option<Party<'a>>,
    /// The destination.
    pub destination: Option<Party<'a>>,
    /// Messages that were seen at both ends.
    pub wire: Vec<Segment>,
    /// How long the guest stood still, and why.
    pub downtime: Downtime,
    /// What the interrupt controller's tables cost.
    pub its: Vec<ItsOp>,
    /// When events were lost that may have been of it.
    pub lost: Vec<loss::Placed>,
}

impl<'a> Migration<'a> {
    /// Its sides, the source first.
    pub fn parties(&self) -> impl Iterator<Item = &Party<'a>> {
        self.source.iter().chain(&self.destination)
    }

    /// The recording whose clock the axis follows.
    pub fn reference(&self) -> Option<&'a Loaded> {
        self.parties().next().map(|party| party.recording)
    }

    /// How many events were lost that may have been of it.
    pub fn lost_events(&self) -> u64 {
        let counts = self.lost.iter().map(|loss| loss.count);
        counts.fold(0, u64::saturating_add)
    }

    /// What puts its figures in doubt, a sentence each; empty for a clean recording.
    pub fn doubts(&self) -> Vec<String> {
        let mut doubts = Vec::new();
        if self.lost_events() > 0 {
            doubts.push(format!("{} events were lost", self.lost_events()));
        }
        doubts.extend(order::impossible(self));
        for party in self.parties() {
            doubts.extend(unpaired(party));
            if let Ending::Cut { offset } = party.recording.ending {
                let name = &party.recording.name;
                doubts.push(format!("recording {name} is cut at byte {offset}"));
            }
            if party.recording.left_out > 0 {
                let events = party.recording.left_out;
                doubts.push(format!("{events} events are more than a report can hold"));
            }
            if party.recording.undefined_hits > 0 {
                let hits = party.recording.undefined_hits;
                doubts.push(format!(
                    "{hits} hits are of probes that the recording lacks"
                ));
            }
        }
        // Both sides may be from one recording.
        let mut said = HashSet::new();
        doubts.retain(|doubt| said.insert(doubt.clone()));
        doubts
    }
}

/// One end of a migration, before it is joined to the other.
#[derive(Clone, Copy)]
struct End<'a> {
    recording: &'a Loaded,
    pid: u32,
    process: &'a Process,
    span: &'a Span,
    id: Option<u64>,
}

/// The migrations in `recordings`, in the order of their starts; those that no probe tells of come
/// after the others.
pub fn find(recordings: &[Loaded]) -> Vec<Migration<'_>> {
    let [source, destination] = WHOLES;
    let outgoing = ends(recordings, source, |span| span.begin.u64("id"));
    let incoming = ends(recordings, destination, |span| span.end.as_ref()?.u64("id"));
    let mut taken = vec![false; incoming.len()];
    let mut pairs: Vec<(Option<End<'_>>, Option<End<'_>>)> = Vec::new();
    for source in &outgoing {
        let twin = twin(source, &incoming, &taken);
        if let Some(taken) = twin.and_then(|index| taken.get_mut(index)) {
            *taken = true;
        }
        pairs.push((
            Some(*source),
            twin.and_then(|index| incoming.get(index).copied()),
        ));
    }
    let alone = incoming.iter().zip(&taken).filter(|(_, taken)| !**taken);
    pairs.extend(alone.map(|(end, _)| (None, Some(*end))));
    pairs.sort_by_key(|(source, destination)| source.or(*destination).map(|end| end.span.start_ns));
    let told = pairs.into_iter();
    let told = told.map(|(source, destination)| join(source, destination));
    told.chain(by_kernel::find(recordings)).collect()
}

fn ends<'a>(
    recordings: &'a [Loaded],
    name: &str,
    id: impl Fn(&Span) -> Option<u64>,
) -> Vec<End<'a>> {
    let mut ends = Vec::new();
    for recording in recordings {
        for (pid, process) in &recording.processes {
            let spans = process.threads.values().flat_map(|thread| &thread.spans);
            ends.extend(spans.filter(|span| span.name() == name).map(|span| End {
                recording,
                pid: *pid,
                process,
                span,
                // No migration has the id 0: it stands for one that was not agreed on.
                id: id(span).filter(|id| *id != 0),
            }));
        }
    }
    ends.sort_by_key(|end| end.span.start_ns);
    ends
}

/// Which of `incoming` is the other end of `source`: the one with its id, or else one that was at
/// work at the same time on the same host, if it never said an id and nothing else qualifies.
fn twin(source: &End<'_>, incoming: &[End<'_>], taken: &[bool]) -> Option<usize> {
    let same_clock = |end: &End<'_>| clock::same_host(source.recording, end.recording);
    let meets = |end: &End<'_>| {
        end.span.start_ns <= source.span.end_ns && source.span.start_ns <= end.span.end_ns
    };
    let free = || {
        let free = incoming
            .iter()
            .enumerate()
            .zip(taken)
            .filter(|(_, taken)| !**taken);
        free.map(|(end, _)| end)
            .filter(|(_, end)| !(same_clock(end) && end.pid == source.pid))
    };
    let known = free().find(|(_, end)| {
        source.id.is_some() && end.id == source.id && (!same_clock(end) || meets(end))
    });
    if let Some((index, _)) = known {
        return Some(index);
    }
    let mut nameless = free().filter(|(_, end)| end.id.is_none() && same_clock(end) && meets(end));
    let (index, _) = nameless.next()?;
    nameless.next().is_none().then_some(index)
}

fn join<'a>(source: Option<End<'a>>, destination: Option<End<'a>>) -> Migration<'a> {
    let clock = match (&source, &destination) {
        (Some(source), Some(destination)) => {
            let (from, to) = (source.span.start_ns, source.span.end_ns);
            let threads = source.process.threads.values();
            let points = threads
                .flat_map(|thread| &thread.points)
                .filter(|point: &&Point| (from..=to).contains(&point.ts_ns));
            clock::relate(source.recording, destination.recording, points)
        }
        _ => Clock::SAME,
    };
    let unplaced = Place {
        origin_ns: 0,
        offset_ns: clock.offset_ns,
    };
    let origin_ns = match (&source, &destination) {
        (Some(source), _) => start_of(source),
        (None, Some(destination)) => unplaced.at(destination.span.start_ns),
        (None, None) => 0,
    };
    let here = Place {
        origin_ns,
        offset_ns: 0,
    };
    let there = Place {
        origin_ns,
        ..unplaced
    };
    let end_ns = source
        .map(|end| here.at(end.span.end_ns))
        .max(destination.map(|end| there.at(end.span.end_ns)))
        .unwrap_or(0);
    let party = |end: Option<End<'a>>, side, place: Place| {
        let end = end?;
        let from = if side == Side::Source {
            0
        } else {
            place.at(end.span.start_ns)
        };
        Some(Party::new(
            side,
            end.recording,
            (end.pid, end.process),
            place,
            (from, end_ns),
        ))
    };
    let said = |name| {
        let said = |end: Option<End<'a>>| Some(end?.span.end.as_ref()?.str(name)?.to_owned());
        said(source).or_else(|| said(destination))
    };
    // The end that was not seen may be what was lost.
    let seen = source
        .iter()
        .chain(&destination)
        .all(|end| end.span.end.is_some());
    let lost_until_ns = if seen { end_ns } else { i64::MAX };
    let id = source
        .and_then(|end| end.id)
        .or_else(|| destination.and_then(|end| end.id));
    let mode = source
        .and_then(|end| end.span.begin.str("mode"))
        .unwrap_or_default()
        .to_owned();
    let source = party(source, Side::Source, here);
    let destination = party(destination, Side::Destination, there);
    let lost = loss::of(source.iter().chain(&destination), lost_until_ns);
    let wire = wire::segments(source.as_ref(), destination.as_ref());
    let downtime = downtime::measure(source.as_ref(), destination.as_ref(), &wire);
    let its = source
        .iter()
        .chain(&destination)
        .flat_map(its::operations)
        .collect();
    Migration {
        view: View::Probes,
        id,
        mode,
        status: said("status").unwrap_or_else(|| "unfinished".to_owned()),
        error: source.iter().chain(&destination).find_map(first_failure),
        origin_ns,
        end_ns,
        clock,
        source,
        destination,
        wire,
        downtime,
        its,
        lost,
    }
}

/// When the source began: with the QMP command that asked for the migration, where it was seen.
/// The migration has a thread of its own, which may begin after the command was answered.
fn start_of(source: &End<'_>) -> i64 {
    let begun_ns = source.span.start_ns;
    let threads = source.process.threads.values();
    let mut asked = threads
        .flat_map(|thread| thread.spans_before(begun_ns))
        .filter(|span| {
            span.name() == "qmp_command"
                && span.begin.str("name") == Some("migrate")
                && begun_ns.saturating_sub(span.end_ns) < ASKED_NS
        });
    let start_ns = asked.next().map_or(begun_ns, |span| span.start_ns);
    i64::try_from(start_ns).unwrap_or(i64::MAX)
}

/// What of a side's probes does not pair, a sentence for each way in which they do not.
fn unpaired(party: &Party<'_>) -> Vec<String> {
    let (mut open, mut closed) = (BTreeMap::new(), BTreeMap::new());
    for problem in &party.problems {
        match problem {
            Problem::Unfinished { name, .. } => *open.entry(name).or_insert(0u64) += 1,
            Problem::EndWithoutBegin { name, .. } => *closed.entry(name).or_insert(0u64) += 1,
        }
    }
    let named = |(name, count): (&String, u64)| match count {
        1 => name.clone(),
        _ => format!("{name} × {count}"),
    };
    [("end", open), ("begin", closed)]
        .into_iter()
        .filter(|(_, names)| !names.is_empty())
        .map(|(edge, names)| {
            let names: Vec<_> = names.into_iter().map(named).collect();
            format!("{}: no {edge} was seen of {}", party.side, names.join(", "))
        })
        .collect()
}

/// The failure that came first on this side, where it is deepest: its cause. It is told with the
/// handler or device that it happened in, which is what a person knows by name.
fn first_failure(party: &Party<'_>) -> Option<String> {
    let failed = |span: &&Placed<'_, Span>| span.what.rc().is_some_and(|rc| rc < 0);
    let deepest_first = |span: &&Placed<'_, Span>| (span.end_ns, Reverse(span.what.depth));
    let first = party
        .spans
        .iter()
        .filter(failed)
        .min_by_key(deepest_first)?;
    let (side, errno) = (party.side, describe::errno(first.what.rc()?));
    let thread = party.process.threads.get(&first.tid)?;
    let around = |span: &&Span| thread.spans.get(span.parent?);
    let named = successors(Some(first.what), around).find(|span| span.begin.str("name").is_some());
    let cause = describe::span(first.what);
    Some(
        match named.map(describe::span).filter(|named| *named != cause) {
            Some(named) => format!("{named}, {cause} ({side}): {errno}"),
            None => format!("{cause} ({side}): {errno}"),
        },
    )
}
