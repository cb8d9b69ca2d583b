//! The messages of the stream, all but the pages of RAM.

use serde::{Deserialize, Serialize};

use super::frame::Kind;
use crate::costs::Costs;
use crate::spanlog::SpanRecord;

/// A session's secret: who echoes it is the peer that was talked to before, and not a recording.
pub(crate) type Token = [u8; 16];

/// How a guest goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Terms {
    /// Whether the source hears what the destination says. If it does not, the destination says
    /// nothing, and [`End`] hands the guest over.
    pub(crate) answered: bool,
    /// Whether the descriptor of guest RAM came with the preface. Pages are not sent then, and there is
    /// one round, the last.
    pub(crate) shared: bool,
    /// How many further connections there are for pages; see [`Join`].
    pub(crate) lanes: u8,
    /// How far behind the start of the stream the file has [all pages](super::mapped), if it has. There is
    /// one round then, the last.
    pub(crate) mapped: Option<u64>,
}

/// What a device's state took on a machine that does not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Rehearsal {
    /// To save it, ns.
    pub(crate) save_ns: u64,
    /// To load it, ns.
    pub(crate) load_ns: u64,
}

/// A payload that postcard encodes, and the kind of the frame that carries it.
pub(crate) trait Message<'de>: Serialize + Deserialize<'de> {
    /// The frame's kind.
    const KIND: Kind;
}

macro_rules! messages {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
        pub(crate) struct $name { $($(#[$field_doc])* pub(crate) $field: $type,)* }

        impl Message<'_> for $name {
            const KIND: Kind = Kind::$name;
        }
    )*};
}

messages! {
    /// The source introduces the guest. The destination answers with [`Welcome`] or [`Failure`].
    Hello {
        /// The migration's id, the same on both sides.
        id: u64,
        /// Comes back in [`Loaded`].
        token: Token,
        /// How the guest is to go over.
        terms: Terms,
        /// The guest's architecture.
        arch: String,
        /// Bytes of a page.
        page_size: u64,
        /// Regions of RAM: guest-physical address and size.
        ram: Vec<(u64, u64)>,
        /// vCPUs.
        vcpus: u32,
        /// Devices in the order in which they are sent: name and version of the state.
        devices: Vec<(String, u32)>,
    }
    /// The destination can take the guest.
    Welcome {
        /// Comes back in [`Commit`].
        token: Token,
        /// What its devices' states took, in their order.
        rehearsal: Vec<Rehearsal>,
    }
    /// The source has opened a further connection, on which nothing but pages and their
    /// acknowledgements goes. The destination answers with its preface.
    Join {
        /// From [`Welcome`].
        token: Token,
        /// Which one, from 0.
        lane: u8,
    }
    /// The source asks for the time.
    Ping {
        /// Sent, source's clock, ns.
        t1: u64,
    }
    /// The destination's answer.
    Pong {
        /// The [`Ping`]'s.
        t1: u64,
        /// Received, destination's clock, ns.
        t2: u64,
        /// Sent, destination's clock, ns.
        t3: u64,
    }
    /// One more frame of pages is loaded.
    Ack {
        /// Payload bytes of all `ram` frames loaded so far.
        bytes: u64,
    }
    /// All pages of a round were sent.
    RoundEnd {
        /// Counts from 1.
        round: u32,
        /// Pages in it.
        pages: u64,
        /// Whether the guest is stopped and no further round follows. Such a round is not answered.
        last: bool,
        /// CRC-32C of all RAM, in the last round of a migration that verifies it.
        checksum: Option<u32>,
    }
    /// All pages of a round are loaded.
    RoundLoaded {
        /// The round.
        round: u32,
    }
    /// Everything was sent. The last message of a stream that is not answered.
    End {
        /// The run state to go on in: QEMU's name of what the source was before the stop.
        state: String,
    }
    /// The destination has loaded and verified everything, and waits for [`Commit`].
    Loaded {
        /// From [`Hello`].
        token: Token,
    }
    /// The source will not run the guest again. The destination starts it.
    Commit {
        /// From [`Welcome`].
        token: Token,
    }
    /// The destination has the guest.
    Running {
        /// When [`Commit`] was received, destination's clock, ns.
        received_ns: u64,
        /// When the first vCPU entered `KVM_RUN`, destination's clock, ns; none if the guest was
        /// not running before either.
        first_run_ns: Option<u64>,
        /// When this was sent, destination's clock, ns.
        sent_ns: u64,
        /// What the destination did.
        spans: Vec<SpanRecord>,
    }
    /// What stops of this guest have cost, for the destination's own. The source's last message, which
    /// is not answered, and which nothing depends on.
    Learned {
        /// Nanoseconds by part.
        costs: Costs,
    }
    /// The sender is there, however long it is busy with something else. Comes at any time after the
    /// introductions, and is not answered.
    Alive {}
    /// The sender gives up. It has not run the guest, or does not need the other side to.
    Failure {
        /// Why: a chain of causes in one line.
        reason: String,
        /// What it did.
        spans: Vec<SpanRecord>,
    }
}

/// One device's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Device<'a> {
    /// Its name.
    pub(crate) name: &'a str,
    /// The version of `state`.
    pub(crate) version: u32,
    /// What its `save` returned.
    pub(crate) state: &'a [u8],
}

impl<'de> Message<'de> for Device<'de> {
    const KIND: Kind = Kind::Device;
}
