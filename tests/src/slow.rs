//! Makes one span of the stop path slower, to see whether a gate finds it.

use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::{Interest, Subscriber, set_global_default};
use tracing::{Event, Metadata};
use vmm::spanlog::monotonic_ns;

/// Has every span called `span` in this process spend `ns` more, from now on, just before it begins:
/// the span around it takes the time. Any other span costs what it did.
///
/// # Panics
/// When the process has a subscriber already.
pub fn down(span: &'static str, ns: u64) {
    set_global_default(Slow { span, ns }).expect("one subscriber in a process");
}

/// Takes interest in one span, and works whenever it is entered.
struct Slow {
    span: &'static str,
    ns: u64,
}

impl Subscriber for Slow {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if self.enabled(metadata) {
            Interest::always()
        } else {
            Interest::never()
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_span() && metadata.name() == self.span
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {}

    fn enter(&self, _: &Id) {
        let start = monotonic_ns();
        while monotonic_ns() - start < self.ns {}
    }

    fn exit(&self, _: &Id) {}
}

#[cfg(test)]
mod tests {
    use vmm::probes::{self, Guarded};
    use vmm::spanlog::SpanLog;

    use super::*;

    #[test]
    fn the_span_around_the_slow_one_takes_longer() {
        const NS: u64 = 50_000_000;
        down("drain", NS);
        let log = SpanLog::open();
        let ok: Result<(), std::io::Error> = probes::do_vm_stop(c"paused").run(|_| {
            probes::vm_state_notify(0, c"paused", 0).run(|_| Ok::<_, std::io::Error>(()))?;
            probes::drain().run(|_| Ok(()))
        });
        ok.unwrap();
        let spans = log.finish();
        let took = |name: &str| {
            let span = spans.iter().find(|span| span.name == name);
            span.map_or(0, |span| span.duration_ns)
        };
        assert!(took("do_vm_stop") >= NS, "{spans:?}");
        assert!(took("vm_state_notify") < NS, "{spans:?}");
    }
}
