//! Finds the migrations in recordings and joins their two sides.
//!
//! A migration is a `migrate` span on the source and a `migrate_incoming` span on the destination
//! with the same id. One recording may hold both sides or one, and many migrations: back and forth
//! between processes, failed ones, ones that the recording cuts.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::iter::successors;

use super::by_kernel;
use super::clock::{self, Clock};
use super::describe;
use super::downtime::{self, Downtime};
use super::its::{self, ItsOp};
use super::load::Loaded;
use super::loss;
use super::order;
use super::party::{Party, Place, Placed, Side, Window};
use super::spans::{Point, Problem, Span};
use super::thread::Process;
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
    /// When its span ended, or the next such one of its process began: one process does not migrate
    /// twice at a time, so an end was not seen. Its clock, ns.
    end_ns: u64,
    /// When the one before began, and the last moment before the next one, ns.
    before_ns: Option<u64>,
    until_ns: u64,
}

/// So many candidates are looked at for the other end of a migration.
const CANDIDATES: usize = 64;

/// The migrations in `recordings`, in the order of their starts; those that no probe tells of come
/// after the others.
pub fn find(recordings: &[Loaded]) -> Vec<Migration<'_>> {
    let [source, destination] = WHOLES;
    let outgoing = ends(recordings, source, |span| span.begin.u64("id"));
    let mut incoming = Incoming::new(ends(recordings, destination, |span| {
        span.end.as_ref()?.u64("id")
    }));
    let mut pairs: Vec<(Option<End<'_>>, Option<End<'_>>)> = Vec::new();
    for source in outgoing {
        let twin = incoming.twin(&source);
        pairs.push((Some(source), twin));
    }
    pairs.extend(incoming.rest().map(|end| (None, Some(end))));
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
            let mut spans: Vec<_> = spans.filter(|span| span.name() == name).collect();
            spans.sort_by_key(|span| span.start_ns);
            // Of several that began at once, all but the last took no time.
            let mut before_ns = None;
            for (index, span) in spans.iter().enumerate() {
                let next = spans.get(index + 1).map(|next| next.start_ns);
                if next == Some(span.start_ns) {
                    continue;
                }
                let until_ns = next.map_or(u64::MAX, |next| next.saturating_sub(1));
                ends.push(End {
                    recording,
                    pid: *pid,
                    process,
                    span,
                    // No migration has the id 0: it stands for one that was not agreed on.
                    id: id(span).filter(|id| *id != 0),
                    end_ns: span.end_ns.min(until_ns),
                    before_ns: before_ns.replace(span.start_ns),
                    until_ns,
                });
            }
        }
    }
    ends.sort_by_key(|end| end.span.start_ns);
    ends
}

/// The destinations' ends that have no source yet.
struct Incoming<'a> {
    ends: Vec<Option<End<'a>>>,
    /// When each began, be it taken or not.
    begins: Vec<u64>,
    /// Their places, by id.
    by_id: HashMap<u64, VecDeque<usize>>,
    /// Those without one, in the order of their begins.
    nameless: Vec<usize>,
}

impl<'a> Incoming<'a> {
    fn new(ends: Vec<End<'a>>) -> Self {
        let mut by_id: HashMap<u64, VecDeque<usize>> = HashMap::new();
        let mut nameless = Vec::new();
        for (index, end) in ends.iter().enumerate() {
            match end.id {
                Some(id) => by_id.entry(id).or_default().push_back(index),
                None => nameless.push(index),
            }
        }
        Self {
            begins: ends.iter().map(|end| end.span.start_ns).collect(),
            ends: ends.into_iter().map(Some).collect(),
            by_id,
            nameless,
        }
    }

    /// Takes the other end of `source`: the one with its id, or else one that was at work at the same
    /// time on the same host, if it never said an id and nothing else qualifies.
    fn twin(&mut self, source: &End<'a>) -> Option<End<'a>> {
        let index = self.known(source).or_else(|| self.silent(source))?;
        self.ends.get_mut(index)?.take()
    }

    fn known(&mut self, source: &End<'a>) -> Option<usize> {
        let same = self.by_id.get_mut(&source.id?)?;
        let is_free = |index: &usize| self.ends.get(*index).is_some_and(Option::is_some);
        while same.pop_front_if(|index| !is_free(index)).is_some() {}
        let mut candidates = same.iter().copied().filter(is_free).take(CANDIDATES);
        candidates.find(|index| {
            let end = self.ends.get(*index).and_then(Option::as_ref);
            end.is_some_and(|end| {
                let one_clock = clock::same_host(source.recording, end.recording);
                !one_clock || (end.pid != source.pid && source.meets(end))
            })
        })
    }

    fn silent(&self, source: &End<'a>) -> Option<usize> {
        let end = |index: &usize| self.ends.get(*index).and_then(Option::as_ref);
        // They are in the order of their begins, those that were taken too: the last ones to begin
        // before the source ended are those that may meet it.
        let begun = self.nameless.partition_point(|index| {
            self.begins
                .get(*index)
                .is_some_and(|begin_ns| *begin_ns <= source.end_ns)
        });
        let last = self.nameless.get(begun.saturating_sub(CANDIDATES)..begun)?;
        let mut fit = last.iter().copied().filter(|index| {
            end(index).is_some_and(|end| {
                clock::same_host(source.recording, end.recording)
                    && end.pid != source.pid
                    && source.meets(end)
            })
        });
        let index = fit.next()?;
        fit.next().is_none().then_some(index)
    }

    fn rest(self) -> impl Iterator<Item = End<'a>> {
        self.ends.into_iter().flatten()
    }
}

impl End<'_> {
    fn meets(&self, other: &Self) -> bool {
        other.span.start_ns <= self.end_ns && self.span.start_ns <= other.end_ns
    }
}

fn join<'a>(source: Option<End<'a>>, destination: Option<End<'a>>) -> Migration<'a> {
    let clock = match (&source, &destination) {
        (Some(source), Some(destination)) => {
            let (from, to) = (source.span.start_ns, source.end_ns);
            let threads = source.process.threads.values();
            let points = threads.flat_map(|thread| {
                let points = &thread.points;
                let first = points.partition_point(|point: &Point| point.ts_ns < from);
                let since = points.get(first..).unwrap_or_default().iter();
                since.take_while(|point| point.ts_ns <= to)
            });
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
        .map(|end| here.at(end.end_ns))
        .max(destination.map(|end| there.at(end.end_ns)))
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
            Window {
                from_ns: from,
                to_ns: end_ns,
                next_ns: place.at(end.until_ns),
            },
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
    let next_ns = source
        .map(|end| here.at(end.until_ns))
        .min(destination.map(|end| there.at(end.until_ns)));
    let lost_until_ns = if seen {
        end_ns
    } else {
        next_ns.unwrap_or(i64::MAX).max(end_ns)
    };
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
                && source
                    .before_ns
                    .is_none_or(|before_ns| span.start_ns > before_ns)
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
