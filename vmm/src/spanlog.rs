//! A thread's own record of the spans that it ran: what `query-migrate` shows, and what the
//! destination sends back to the source.
//!
//! The log belongs to the thread that opened it. The stop path runs on one thread from end to end,
//! so there is nothing to lock, and a span on any other thread costs one look at an empty slot.

use std::borrow::Cow;
use std::cell::RefCell;
use std::ffi::CStr;
use std::marker::PhantomData;

use serde::{Deserialize, Serialize};

/// Spans that one log keeps; further ones are counted as dropped. A migration has some tens, and
/// a few for each RAM round.
pub const CAPACITY: usize = 4096;

/// The result of a span that nothing finished, as when a panic unwinds through it.
pub const UNFINISHED: i64 = -(libc::ECANCELED as i64);

/// One finished span.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpanRecord {
    /// The row of the probe table.
    pub name: Cow<'static, str>,
    /// Its hop.
    pub hop: u8,
    /// Its first string argument: a handler's or a device's name, a run state, an address.
    pub detail: Option<String>,
    /// How many spans of this thread enclose it.
    pub depth: u8,
    /// `CLOCK_MONOTONIC` at its begin, ns.
    pub start_ns: u64,
    /// How long it took, ns.
    pub duration_ns: u64,
    /// 0, or a negative errno.
    pub rc: i64,
}

/// Now, in nanoseconds of `CLOCK_MONOTONIC`: the clock of every probe and of the eBPF programs.
///
/// Read through the vDSO. `rustix` finds it itself: the static programs of the testbed are linked
/// with a musl that can't read the symbol table of newer kernels' vDSO, and would make a system
/// call of each of the reads that a span needs.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

#[derive(Default)]
struct Records {
    spans: Vec<SpanRecord>,
    depth: u8,
}

thread_local! {
    static LOG: RefCell<Option<Records>> = const { RefCell::new(None) };
}

/// An open log; spans of this thread are recorded while it lives.
pub struct SpanLog {
    /// A log can't move to another thread: it would close the wrong one.
    this_thread: PhantomData<*const ()>,
}

impl SpanLog {
    /// Starts to record this thread's spans. A log that was open on this thread is replaced.
    pub fn open() -> Self {
        let records = Records {
            spans: Vec::with_capacity(CAPACITY),
            depth: 0,
        };
        LOG.set(Some(records));
        SpanLog {
            this_thread: PhantomData,
        }
    }

    /// The spans recorded so far, in the order in which they began. Spans still open have a
    /// duration of 0 and [`UNFINISHED`] as their result.
    pub fn spans(&self) -> Vec<SpanRecord> {
        LOG.with_borrow(|log| log.as_ref().map(|r| r.spans.clone()).unwrap_or_default())
    }

    /// Stops recording and returns what was recorded.
    pub fn finish(self) -> Vec<SpanRecord> {
        LOG.take().map(|records| records.spans).unwrap_or_default()
    }
}

impl Drop for SpanLog {
    fn drop(&mut self) {
        LOG.set(None);
    }
}

/// A span that the log has seen begin.
#[derive(Debug)]
pub struct Open {
    index: Option<usize>,
}

/// Notes that a span begins; called by its guard before the begin probe fires.
pub(crate) fn open(name: &'static str, hop: u8, detail: Option<&CStr>) -> Open {
    let index = LOG.with_borrow_mut(|log| {
        let records = log.as_mut()?;
        let depth = records.depth;
        records.depth = depth.saturating_add(1);
        if records.spans.len() == CAPACITY {
            return None;
        }
        records.spans.push(SpanRecord {
            name: Cow::Borrowed(name),
            hop,
            detail: detail.map(|text| text.to_string_lossy().into_owned()),
            depth,
            start_ns: monotonic_ns(),
            duration_ns: 0,
            rc: UNFINISHED,
        });
        Some(records.spans.len() - 1)
    });
    Open { index }
}

/// Notes that a span ended; called by its guard after the end probe fired.
pub(crate) fn close(open: &Open, rc: i64) {
    LOG.with_borrow_mut(|log| {
        let Some(records) = log.as_mut() else { return };
        records.depth = records.depth.saturating_sub(1);
        let Some(span) = open.index.and_then(|index| records.spans.get_mut(index)) else {
            return;
        };
        span.duration_ns = monotonic_ns().saturating_sub(span.start_ns);
        span.rc = rc;
    });
}
