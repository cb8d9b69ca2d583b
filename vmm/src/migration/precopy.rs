//! `[2]` The migration's thread, once there is a connection: RAM in rounds while the guest runs, then
//! the stop and the switchover.

use std::collections::VecDeque;

use super::board::Board;
use super::converge::{Convergence, Decision};
use super::link::Link;
use super::outgoing::{Attempt, Error, Parameters};
use super::pace::Pace;
use super::pages::SendError;
use super::predict::{Fixed, Forecast};
use super::settings::{Capability, Parameter};
use super::status::MigrationStatus;
use super::switchover;
use super::throttle::AutoConverge;
use super::timeout;
use super::vm::SourceVm;
use crate::memory::{PAGE_SIZE, PageRun};
use crate::probes::{self, Guarded};
use crate::spanlog::monotonic_ns;

const NS_PER_MS: u64 = 1_000_000;
/// Pages that are protected at once, and then sent: 64 MiB.
const CHUNK: u64 = 16 << 10;

/// `[2]` Everything after the connection, from the first page to the destination's word that it runs
/// the guest.
///
/// # Errors
/// Whatever ended it; `attempt` says who has the guest then.
pub(super) fn migration_thread(
    vm: &impl SourceVm,
    link: &mut Link,
    attempt: &mut Attempt,
    parameters: &Parameters,
    board: &Board,
) -> Result<(), Error> {
    probes::migration_thread(attempt.id()).run(|_| {
        let round_trip_ns = link
            .clock()
            .at(monotonic_ns())
            .map_or(0, |clock| 2 * clock.error_ns);
        let fixed = Fixed::new(
            vm.costs(),
            &attempt.devices,
            link.rehearsal(),
            round_trip_ns,
        );
        let rest = match link.shares_ram() {
            false => timeout::watched(board, || ram_rounds(vm, link, fixed, board))?,
            true => nothing(vm, fixed, board)?,
        };
        attempt.forecast = Some(rest.forecast.clone());
        switchover::complete(vm, link, attempt, rest, parameters, board)
    })
}

/// What precopy leaves for the stop.
pub(super) struct Rest {
    /// Pages that were taken from the dirty log and not sent yet.
    pub(super) runs: Vec<PageRun>,
    /// The number of the round that sends them.
    pub(super) round: u32,
    /// What the stop is expected to cost.
    pub(super) forecast: Forecast,
}

/// The destination has the guest's RAM already: there is nothing to do but to stop.
fn nothing(vm: &impl SourceVm, fixed: Fixed, board: &Board) -> Result<Rest, Error> {
    board.set_status(MigrationStatus::Active);
    let convergence = Convergence::new(0, 0, fixed.least_ns());
    let (limit_ms, limit_ns) = limit(vm, board);
    board.set_expected_downtime(Some(fixed.total_ns()));
    if !convergence.fits(0, limit_ns) {
        let fixed_ns = fixed.least_ns();
        return Err(Error::LimitTooLow { fixed_ns, limit_ms });
    }
    Ok(Rest {
        runs: Vec::new(),
        round: 1,
        forecast: Forecast {
            limit_ms,
            left_bytes: 0,
            ram_ns: 0,
            fixed,
        },
    })
}

/// Sends all of RAM, then what was dirtied meanwhile, and again, until it is time to stop.
fn ram_rounds(
    vm: &impl SourceVm,
    link: &mut Link,
    fixed: Fixed,
    board: &Board,
) -> Result<Rest, Error> {
    let ram = vm.ram();
    vm.set_dirty_log(true)?;
    board.set_status(MigrationStatus::Active);
    let mut auto_converge = AutoConverge::default();
    let mut convergence = Convergence::new(ram.size(), fixed.late_bytes(), fixed.least_ns());
    // What the guest writes from here on, also to a page that was untouched, is in the dirty log.
    vm.protect(&ram.written_and_untouched()?.1)?;
    // A page that was written before it was protected is no longer untouched.
    let (mut runs, mut untouched) = ram.written_and_untouched()?;
    let mut round = 1;
    loop {
        let began = monotonic_ns();
        let sent = probes::ram_round(round.into()).run(|span| {
            let mut sent = link.send_pages(&ram, round, &untouched, &[], Pace::Limited, board)?;
            for chunk in chunks(&runs) {
                vm.protect(&chunk)?;
                sent.add(link.send_pages(&ram, round, &[], &chunk, Pace::Limited, board)?);
            }
            link.finish_round(round, sent)?;
            (span.pages, span.bytes) = (sent.pages, sent.bytes);
            Ok::<_, SendError>(sent)
        })?;
        let took_ns = monotonic_ns().saturating_sub(began);
        link.read_clock()?;

        untouched.clear();
        let sync_began = monotonic_ns();
        runs = vm.dirty()?;
        convergence.synced(monotonic_ns().saturating_sub(sync_began));
        let remaining = bytes(&runs);
        let (limit_ms, limit_ns) = limit(vm, board);
        let decision = match convergence.round(sent.bytes, took_ns, remaining, limit_ns) {
            _ if board.is_forced() => Decision::Stop,
            decision => decision,
        };
        let slower = match board.settings().is_on(Capability::AutoConverge) {
            true => auto_converge.round(sent.bytes, remaining, board.settings()),
            false => None,
        };
        let bytes = remaining.saturating_add(fixed.late_bytes());
        let ram_ns = convergence.ram_ns(remaining);
        let ram_ns = ram_ns.map(|round_ns| fixed.ram_ns(bytes, round_ns));
        let expected_ns = ram_ns.map(|ns| ns.saturating_add(fixed.total_ns()));
        board.set_expected_downtime(expected_ns);
        board.update_ram(|ram| {
            ram.transferred = link.loaded_bytes();
            ram.remaining = remaining;
            ram.dirty_sync_count += 1;
            ram.dirty_pages_rate = per_second(remaining / PAGE_SIZE, took_ns);
            ram.mbps = per_second(sent.bytes * 8, took_ns) as f64 / 1e6;
            ram.pages_per_second = per_second(sent.pages, took_ns);
            ram.precopy_bytes += sent.bytes;
        });
        match (decision, slower) {
            (Decision::Another | Decision::GiveUp, Some(percentage)) => {
                vm.cpu_throttle_set(percentage);
                board.set_cpu_throttle(percentage);
                convergence.slowed_down();
                round += 1;
            }
            (Decision::Another, None) => round += 1,
            (Decision::Stop, _) => {
                return Ok(Rest {
                    runs,
                    round: round + 1,
                    forecast: Forecast {
                        limit_ms,
                        left_bytes: remaining,
                        ram_ns: ram_ns.unwrap_or(0),
                        fixed,
                    },
                });
            }
            (Decision::GiveUp, None) if !convergence.fits(0, limit_ns) => {
                let fixed_ns = fixed.least_ns();
                return Err(Error::LimitTooLow { fixed_ns, limit_ms });
            }
            (Decision::GiveUp, None) => {
                return Err(Error::NotConverging {
                    rounds: round,
                    dirtied: remaining,
                    rate: convergence.bytes_per_second(),
                    limit_ms,
                });
            }
        }
    }
}

/// The downtime limit as it is now, ms, and how long a stop of this guest may take, ns: one that is paused
/// anyway has no downtime.
fn limit(vm: &impl SourceVm, board: &Board) -> (u64, u64) {
    let limit_ms = board.settings().parameter(Parameter::DowntimeLimit);
    match vm.is_running() {
        true => (limit_ms, limit_ms.saturating_mul(NS_PER_MS)),
        false => (limit_ms, u64::MAX),
    }
}

/// The same pages in lists of [`CHUNK`] pages at most.
fn chunks(runs: &[PageRun]) -> impl Iterator<Item = Vec<PageRun>> {
    let mut rest: VecDeque<_> = runs.iter().copied().collect();
    std::iter::from_fn(move || {
        let (mut chunk, mut room) = (Vec::new(), CHUNK);
        while let Some(run) = rest.pop_front() {
            let pages = run.pages.min(room);
            chunk.push(PageRun { pages, ..run });
            room -= pages;
            if pages < run.pages {
                rest.push_front(PageRun {
                    gpa: run.gpa + pages * PAGE_SIZE,
                    pages: run.pages - pages,
                });
            }
            if room == 0 {
                break;
            }
        }
        (!chunk.is_empty()).then_some(chunk)
    })
}

/// Bytes of all `runs`.
pub(super) fn bytes(runs: &[PageRun]) -> u64 {
    runs.iter().map(|run| run.pages * PAGE_SIZE).sum()
}

fn per_second(count: u64, took_ns: u64) -> u64 {
    let rate = u128::from(count) * 1_000_000_000 / u128::from(took_ns.max(1));
    u64::try_from(rate).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_cut_into_chunks_in_their_order() {
        let run = |page, pages| PageRun {
            gpa: page * PAGE_SIZE,
            pages,
        };
        assert_eq!(chunks(&[]).count(), 0);
        let runs = [run(0, 1), run(9, 2 * CHUNK), run(3 * CHUNK, 7)];
        let expected = [
            vec![run(0, 1), run(9, CHUNK - 1)],
            vec![run(8 + CHUNK, CHUNK)],
            vec![run(8 + 2 * CHUNK, 1), run(3 * CHUNK, 7)],
        ];
        assert_eq!(chunks(&runs).collect::<Vec<_>>(), expected);
    }
}
