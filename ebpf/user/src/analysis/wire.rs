//! Messages of the migration channel that were seen leaving one side and arriving at the other.

use std::collections::HashMap;

use super::party::{Party, Placed, Side};
use super::spans::Point;

/// One message under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The side that sent it.
    pub from: Side,
    /// What it is.
    pub kind: String,
    /// The sender's count.
    pub seq: u64,
    /// About to be written, ns.
    pub sent_ns: i64,
    /// Read at the other side, ns.
    pub received_ns: i64,
    /// The sending thread.
    pub sender: u32,
    /// The receiving thread.
    pub receiver: u32,
}

impl Segment {
    /// How long it was under way, ns; 0 if the clocks say that it arrived before it was sent.
    pub fn duration_ns(&self) -> u64 {
        u64::try_from(self.received_ns.saturating_sub(self.sent_ns)).unwrap_or(0)
    }

    /// What reports call it.
    pub fn describe(&self) -> String {
        format!("{} #{}", self.kind, self.seq)
    }
}

/// The messages between the two sides, in the order in which they were sent.
pub fn segments(source: Option<&Party<'_>>, destination: Option<&Party<'_>>) -> Vec<Segment> {
    let (Some(source), Some(destination)) = (source, destination) else {
        return Vec::new();
    };
    let mut segments = one_way(source, destination);
    segments.extend(one_way(destination, source));
    segments.sort_by_key(|segment| (segment.sent_ns, segment.received_ns));
    segments
}

fn one_way(from: &Party<'_>, to: &Party<'_>) -> Vec<Segment> {
    let mut sent: HashMap<_, &Placed<'_, Point>> = from
        .points_of("channel_send")
        .filter_map(|point| Some((message(point)?, point)))
        .collect();
    let mut segments = Vec::new();
    for arrival in to.points_of("channel_recv") {
        let Some(message) = message(arrival) else {
            continue;
        };
        // Each message arrives once.
        let Some(departure) = sent.remove(&message) else {
            continue;
        };
        segments.push(Segment {
            from: from.side,
            kind: message.0.to_owned(),
            seq: message.1,
            sent_ns: departure.start_ns,
            received_ns: arrival.start_ns,
            sender: departure.tid,
            receiver: arrival.tid,
        });
    }
    segments
}

fn message<'a>(point: &Placed<'a, Point>) -> Option<(&'a str, u64)> {
    Some((point.what.args.str("kind")?, point.what.args.u64("seq")?))
}
