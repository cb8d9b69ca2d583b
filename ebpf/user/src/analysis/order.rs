//! Orders that cannot be: effects that were seen before their causes.
//!
//! On one clock they mean that something was not seen, or that two copies of a guest ran. Across two
//! they mean, most often, that the clocks are further apart than was thought; where the bound of
//! that error is known, only what it cannot excuse is told.

use super::migration::Migration;
use super::party::Side;
use super::wire::Segment;

/// What of the migration is in an impossible order, a sentence each.
pub(super) fn impossible(migration: &Migration<'_>) -> Vec<String> {
    let excused_ns = migration.clock.error_ns.unwrap_or(0);
    let early = |cause_ns: i64, effect_ns: i64| {
        let early_ns = u64::try_from(cause_ns.saturating_sub(effect_ns)).unwrap_or(0);
        (early_ns > excused_ns).then_some(early_ns)
    };
    let bound = match migration.clock.error_ns {
        None => "; how far the clocks are apart is not known".to_owned(),
        Some(0) => String::new(),
        Some(error) => format!("; the clocks' error explains {}", microseconds(error)),
    };
    let sentence = |what: &str, early_ns| {
        let by = microseconds(early_ns);
        format!("impossible order: {what}, by {by}{bound}")
    };
    let mut found = Vec::new();
    for from in [Side::Source, Side::Destination] {
        let messages = migration.wire.iter().filter(|message| message.from == from);
        let early = messages.filter_map(|message: &Segment| {
            Some((early(message.sent_ns, message.received_ns)?, message))
        });
        let early: Vec<_> = early.collect();
        if let Some((early_ns, message)) = early.iter().max_by_key(|(early_ns, _)| *early_ns) {
            let count = early.len();
            let what = format!(
                "{count} of the {from}'s messages arrived before they were sent, most of all {}",
                message.describe()
            );
            found.push(sentence(&what, *early_ns));
        }
    }
    if let (Some(_), Some(destination)) = (&migration.source, &migration.destination) {
        // The axis begins with the source's first step.
        let begun = destination.spans.iter().map(|span| span.start_ns).min();
        if let Some(early_ns) = begun.and_then(|begun_ns| early(0, begun_ns)) {
            found.push(sentence(
                "the destination began before the source",
                early_ns,
            ));
        }
    }
    let dark = migration.downtime.blackout;
    if let Some(early_ns) = dark.and_then(|(dark_ns, light_ns)| early(dark_ns, light_ns)) {
        found.push(sentence("the guest ran on before it had stopped", early_ns));
    }
    found
}

fn microseconds(ns: u64) -> String {
    format!("{}.{:03} µs", ns / 1000, ns % 1000)
}
