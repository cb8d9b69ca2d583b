//! The switchover at the source: stop, last pages, devices, and the commit.
//!
//! `commit.rs` is the rule of who has the guest; here it is carried out.

use std::time::Duration;

use super::board::Board;
use super::commit::SourceEvent;
use super::link::{Committed, Link};
use super::outgoing::{Attempt, Error, Parameters};
use super::pace::Pace;
use super::precopy::{Rest, bytes};
use super::settings::Capability;
use super::status::MigrationStatus;
use super::vm::SourceVm;
use crate::memory::merge;
use crate::probes::{self, Guarded};
use crate::runstate::RunState;

/// How often a source that waits for a client looks for the other side.
const LOOK: Duration = Duration::from_secs(1);

/// Stops the guest, sends the rest, and hands the guest over.
///
/// # Errors
/// Whatever went wrong; `attempt` says who has the guest then.
pub(super) fn complete(
    vm: &impl SourceVm,
    link: &mut Link,
    attempt: &mut Attempt,
    rest: Rest,
    parameters: &Parameters,
    board: &Board,
) -> Result<(), Error> {
    attempt.commit = attempt.commit.on(SourceEvent::Stop);
    vm.migration_stop_vm(&mut attempt.stop)?;
    if board.settings().is_on(Capability::PauseBeforeSwitchover) {
        pre_switchover(link, attempt.id(), board)?;
    }
    board.set_status(MigrationStatus::Device);
    attempt.ram_bytes = Some(ram_final(vm, link, rest, parameters, board)?);
    device_save(vm, link, attempt)?;
    let old = attempt.stop.vm_old_state.unwrap_or(RunState::Paused);
    if !link.is_answered() {
        board.release_events();
        return hand_over(vm, link, attempt, old, board);
    }
    link.send_end(old)?;
    // It is the destination's turn: there is time to say that the guest is stopped.
    board.release_events();
    switchover(vm, link, attempt, board)
}

/// Waits for `migrate-continue`, with the guest stopped. A client uses the time for what has to move
/// with the guest, such as its disks.
fn pre_switchover(link: &mut Link, id: u64, board: &Board) -> Result<(), Error> {
    probes::pre_switchover(id).run(|_| {
        board.set_status(MigrationStatus::PreSwitchover);
        board.release_events();
        while !board.wait_go_on(LOOK)? {
            link.check_peer()?;
        }
        Ok(())
    })
}

/// Sends the pages that are dirty still. The handlers of the stop have run: what they wrote to
/// guest RAM, such as the tables of the ITS, is among them. Returns how many bytes they are.
fn ram_final(
    vm: &impl SourceVm,
    link: &mut Link,
    rest: Rest,
    parameters: &Parameters,
    board: &Board,
) -> Result<u64, Error> {
    probes::ram_final().run(|span| {
        let ram = vm.ram();
        let dirty = match link.shares_ram() {
            false => vm.dirty()?,
            true => Vec::new(),
        };
        let runs = merge(rest.runs, dirty);
        let bytes = bytes(&runs);
        board.update_ram(|ram| {
            ram.remaining = bytes;
            ram.dirty_sync_count += 1;
        });
        let sent = link.send_pages(&ram, rest.round, &[], &runs, Pace::Full, board)?;
        let checksum = if parameters.verify_ram {
            Some(ram.checksum()?)
        } else {
            None
        };
        link.finish_last_round(rest.round, sent, checksum)?;
        (span.pages, span.bytes) = (sent.pages, sent.bytes);
        board.update_ram(|ram| ram.downtime_bytes = sent.bytes);
        Ok(bytes)
    })
}

/// Reads every device's state and sends it.
fn device_save(vm: &impl SourceVm, link: &mut Link, attempt: &Attempt) -> Result<(), Error> {
    for (index, name) in attempt.devices.iter().enumerate() {
        probes::device_save(name).run(|span| {
            let saved = vm.save_device(index).map_err(|source| {
                let name = name.to_string_lossy().into_owned();
                Error::SaveDevice { name, source }
            })?;
            span.bytes = saved.state.len() as u64;
            Ok::<_, Error>(link.send_device(&saved)?)
        })?;
    }
    Ok(())
}

/// Waits for the destination to be ready, commits, and waits for it to run the guest.
fn switchover(
    vm: &impl SourceVm,
    link: &mut Link,
    attempt: &mut Attempt,
    board: &Board,
) -> Result<(), Error> {
    probes::switchover(attempt.id()).run(|_| {
        link.wait_for_answer()?;
        commit(vm, link, attempt, board)?;
        let (first_run_ns, spans) = link.wait_running()?;
        attempt.commit = attempt.commit.on(SourceEvent::Running);
        attempt.first_run_ns = first_run_ns;
        attempt.peer_spans = spans;
        Ok::<_, Error>(())
    })?;
    if let Some(ns) = attempt.downtime_ns(link.clock()) {
        probes::downtime_end(attempt.id(), ns);
    }
    Ok(())
}

/// The destination has answered: if everything is loaded there, gives the guest up and tells the
/// destination so, unless somebody else was quicker.
fn commit(
    vm: &impl SourceVm,
    link: &mut Link,
    attempt: &mut Attempt,
    board: &Board,
) -> Result<(), Error> {
    probes::migration_commit(attempt.id()).run(|_| {
        link.check_loaded()?;
        board.update_ram(|ram| ram.transferred = link.loaded_bytes());
        board.seal()?;
        let mut committed = None;
        vm.commit(&mut || committed = Some(link.send_commit()))
            .map_err(Error::Interrupted)?;
        note(committed, attempt)
    })
}

/// Notes whether the guest may be the other side's now.
fn note(committed: Option<Committed>, attempt: &mut Attempt) -> Result<(), Error> {
    match committed {
        Some(Committed::Yes(sent)) => {
            attempt.commit = attempt.commit.on(SourceEvent::Loaded);
            Ok(sent?)
        }
        Some(Committed::No(error)) => Err(error.into()),
        None => Ok(()),
    }
}

/// Gives the guest up to a stream that nobody answers, and takes it back if it did not get there and
/// nobody can have found it.
fn hand_over(
    vm: &impl SourceVm,
    link: &mut Link,
    attempt: &mut Attempt,
    old: RunState,
    board: &Board,
) -> Result<(), Error> {
    probes::switchover(attempt.id()).run(|_| {
        link.prepare_hand_over()?;
        let committed = probes::migration_commit(attempt.id()).run(|_| {
            board.seal()?;
            let mut committed = None;
            vm.commit(&mut || committed = Some(link.hand_over(old)))
                .map_err(Error::Interrupted)?;
            note(committed, attempt)
        });
        let finished = committed.and_then(|()| Ok(link.finish()?));
        let event = match finished {
            Ok(()) => SourceEvent::Running,
            Err(_) if link.take_back() => SourceEvent::Refused,
            Err(_) => SourceEvent::Fail,
        };
        attempt.commit = attempt.commit.on(event);
        board.update_ram(|ram| ram.transferred = link.loaded_bytes());
        finished
    })
}
