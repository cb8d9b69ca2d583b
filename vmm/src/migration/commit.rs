//! Who has the guest: the commit rule as two small tables, one a side.
//!
//! Never two running copies, never none by accident. `ARCHITECTURE.md` lists every point at which
//! a side can die or the connection can break, and what each side does then; the test below walks
//! all of them.
//!
//! Where the destination can't answer, the source alone decides: `Loaded` is its own word that all
//! but the end was written, `Running` that the end was taken, `Refused` that it took it back. The
//! destination has `Verified` and `Commit` in one, when it reads the end.

/// Where the source stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    /// The guest runs here, or does whatever it did before; RAM is sent.
    Live,
    /// The guest is stopped for the switchover; the rest is sent.
    Stopped,
    /// `commit` may have left this machine. The guest is not run here any more.
    Committed,
    /// The destination has the guest.
    Completed,
    /// The guest is here as if nothing had been: it runs again if it ran before.
    Resumed,
    /// Nobody here can know who has the guest. It stays paused until a person decides.
    Unknown,
}

/// What happens to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SourceEvent {
    /// What is left of RAM fits the downtime limit.
    Stop,
    /// The destination says that everything is loaded and verified.
    Loaded,
    /// The destination says that it has the guest.
    Running,
    /// The destination says that it does not run the guest and never will.
    Refused,
    /// Anything else goes wrong, or a person cancels.
    Fail,
}

const SOURCE: &[(Source, SourceEvent, Source)] = &[
    (Source::Live, SourceEvent::Stop, Source::Stopped),
    (Source::Live, SourceEvent::Refused, Source::Resumed),
    (Source::Live, SourceEvent::Fail, Source::Resumed),
    (Source::Stopped, SourceEvent::Loaded, Source::Committed),
    (Source::Stopped, SourceEvent::Refused, Source::Resumed),
    (Source::Stopped, SourceEvent::Fail, Source::Resumed),
    (Source::Committed, SourceEvent::Running, Source::Completed),
    (Source::Committed, SourceEvent::Refused, Source::Resumed),
    (Source::Committed, SourceEvent::Fail, Source::Unknown),
];

impl Source {
    /// The state after `event`; the same one if `event` means nothing in it.
    pub(crate) fn on(self, event: SourceEvent) -> Source {
        let row = SOURCE
            .iter()
            .find(|&&(from, on, _)| (from, on) == (self, event));
        row.map_or(self, |&(.., to)| to)
    }
}

/// Where the destination stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Destination {
    /// RAM and state are loaded.
    Receiving,
    /// Everything is loaded and verified, and the source knows or will know.
    Loaded,
    /// The source has committed: the guest is this side's.
    Running,
    /// This side never runs the guest.
    Failed,
}

/// What happens to the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DestinationEvent {
    /// The last message was loaded, and everything fits.
    Verified,
    /// The source says that the guest is this side's, and it could be started.
    Commit,
    /// Anything goes wrong.
    Fail,
}

const DESTINATION: &[(Destination, DestinationEvent, Destination)] = &[
    (
        Destination::Receiving,
        DestinationEvent::Verified,
        Destination::Loaded,
    ),
    (
        Destination::Receiving,
        DestinationEvent::Fail,
        Destination::Failed,
    ),
    (
        Destination::Loaded,
        DestinationEvent::Commit,
        Destination::Running,
    ),
    (
        Destination::Loaded,
        DestinationEvent::Fail,
        Destination::Failed,
    ),
];

impl Destination {
    /// The state after `event`; the same one if `event` means nothing in it.
    pub(crate) fn on(self, event: DestinationEvent) -> Destination {
        let row = DESTINATION
            .iter()
            .find(|&&(from, on, _)| (from, on) == (self, event));
        row.map_or(self, |&(.., to)| to)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashSet, VecDeque};

    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    enum Message {
        End,
        Loaded,
        Commit,
        Running,
        Failure,
    }

    /// What the guest goes over.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    enum Way {
        /// A connection.
        Answered,
        /// A pipe, which the destination reads while it is written.
        Pipe,
        /// A file, which it can read once the source has let go of it.
        File,
    }

    /// Both sides, whether each process lives, what is under way in each direction, and whether
    /// the connection still carries it.
    #[derive(Clone, Debug, PartialEq, Eq, Hash)]
    struct World {
        way: Way,
        source: Source,
        destination: Destination,
        source_lives: bool,
        destination_lives: bool,
        to_destination: Vec<Message>,
        to_source: Vec<Message>,
        connected: bool,
    }

    impl World {
        fn start(way: Way) -> World {
            World {
                way,
                source: Source::Live,
                destination: Destination::Receiving,
                source_lives: true,
                destination_lives: true,
                to_destination: Vec::new(),
                to_source: Vec::new(),
                connected: true,
            }
        }

        fn source_runs(&self) -> bool {
            self.source_lives && matches!(self.source, Source::Live | Source::Resumed)
        }

        fn destination_runs(&self) -> bool {
            self.destination_lives && self.destination == Destination::Running
        }

        fn with(&self, change: impl FnOnce(&mut World)) -> World {
            let mut next = self.clone();
            change(&mut next);
            next
        }

        /// Every world that this one can become by one step.
        fn next(&self) -> Vec<World> {
            let mut next = Vec::new();
            if self.source_lives {
                next.push(self.with(|w| w.source_lives = false));
                if self.source == Source::Live {
                    next.push(self.with(|w| {
                        w.source = w.source.on(SourceEvent::Stop);
                        if w.way == Way::Answered {
                            w.to_destination.push(Message::End);
                        }
                    }));
                }
                if self.way != Way::Answered {
                    self.alone(&mut next);
                }
                // The source notices a break, times out, or is cancelled before the commit.
                next.push(self.with(|w| w.source_fails(SourceEvent::Fail)));
                if let Some(&message) = self.to_source.first() {
                    next.push(self.with(|w| w.source_receives(message)));
                }
            }
            if self.destination_lives {
                next.push(self.with(|w| w.destination_lives = false));
                next.push(self.with(World::destination_fails));
                let readable = self.way != Way::File || self.is_let_go();
                if let Some(&message) = self.to_destination.first().filter(|_| readable) {
                    next.push(self.with(|w| w.destination_receives(message)));
                }
            }
            if self.connected && self.way != Way::File {
                // The connection breaks and takes any of what is under way with it.
                next.push(self.with(|w| {
                    w.connected = false;
                    w.to_destination.clear();
                    w.to_source.clear();
                }));
            }
            next
        }

        /// What a source does that nobody answers.
        fn alone(&self, next: &mut Vec<World>) {
            match self.source {
                Source::Stopped => next.push(self.with(|w| {
                    w.source = w.source.on(SourceEvent::Loaded);
                    if w.connected {
                        w.to_destination.push(Message::End);
                    }
                })),
                Source::Committed => {
                    next.push(self.with(|w| w.source = w.source.on(SourceEvent::Running)));
                    if self.way == Way::File {
                        next.push(self.with(|w| {
                            w.source = w.source.on(SourceEvent::Refused);
                            w.to_destination.clear();
                        }));
                    }
                }
                _ => {}
            }
        }

        /// Whether the file's lock is free.
        fn is_let_go(&self) -> bool {
            use Source::{Completed, Resumed, Unknown};
            !self.source_lives || matches!(self.source, Completed | Resumed | Unknown)
        }

        fn source_receives(&mut self, message: Message) {
            self.to_source.remove(0);
            let event = match message {
                Message::Loaded => SourceEvent::Loaded,
                Message::Running => SourceEvent::Running,
                _ => SourceEvent::Refused,
            };
            let before = self.source;
            self.source = before.on(event);
            if before != self.source && self.source == Source::Committed && self.connected {
                self.to_destination.push(Message::Commit);
            }
        }

        fn source_fails(&mut self, event: SourceEvent) {
            self.source = self.source.on(event);
        }

        fn destination_receives(&mut self, message: Message) {
            self.to_destination.remove(0);
            if self.way != Way::Answered {
                let verified = self.destination.on(DestinationEvent::Verified);
                self.destination = verified.on(DestinationEvent::Commit);
                return;
            }
            let (event, answer) = match message {
                Message::End => (DestinationEvent::Verified, Message::Loaded),
                _ => (DestinationEvent::Commit, Message::Running),
            };
            let before = self.destination;
            self.destination = before.on(event);
            if before != self.destination && self.connected {
                self.to_source.push(answer);
            }
        }

        fn destination_fails(&mut self) {
            let before = self.destination;
            self.destination = before.on(DestinationEvent::Fail);
            let heard = self.connected && self.way == Way::Answered;
            if before != self.destination && heard {
                self.to_source.push(Message::Failure);
            }
        }
    }

    /// Every world that can be reached from the starts.
    fn worlds() -> HashSet<World> {
        let starts = [Way::Answered, Way::Pipe, Way::File].map(World::start);
        let mut seen = HashSet::from(starts.clone());
        let mut left = VecDeque::from(starts);
        while let Some(world) = left.pop_front() {
            for next in world.next() {
                if seen.insert(next.clone()) {
                    left.push_back(next);
                }
            }
        }
        seen
    }

    #[test]
    fn two_copies_never_run() {
        let worlds = worlds();
        assert!(worlds.len() > 100, "only {} worlds", worlds.len());
        for world in worlds {
            assert!(
                !(world.source_runs() && world.destination_runs()),
                "{world:?}"
            );
        }
    }

    #[test]
    fn no_copy_runs_only_during_the_switchover_or_when_the_source_says_unknown_or_is_dead() {
        for world in worlds()
            .iter()
            .filter(|w| !w.source_runs() && !w.destination_runs())
        {
            let explained = !world.source_lives
                || matches!(world.source, Source::Stopped | Source::Committed | Source::Unknown)
                // It lies in the file, or is on its way, or its reader lost it, and nobody can know
                // here: it is paused, and a person can let it go on.
                || (world.source == Source::Completed && world.way != Way::Answered)
                // The destination had it and died with it, as any monitor can.
                || (world.source == Source::Completed && !world.destination_lives);
            assert!(explained, "{world:?}");
        }
    }

    #[test]
    fn a_source_that_lives_never_stays_stopped() {
        for state in [Source::Stopped, Source::Committed] {
            let after = state.on(SourceEvent::Fail);
            assert!(
                matches!(after, Source::Resumed | Source::Unknown),
                "{state:?}"
            );
        }
    }

    #[test]
    fn what_is_over_stays_over() {
        use SourceEvent::*;
        for state in [Source::Completed, Source::Resumed, Source::Unknown] {
            for event in [Stop, Loaded, Running, Refused, Fail] {
                assert_eq!(state.on(event), state);
            }
        }
        for state in [Destination::Running, Destination::Failed] {
            for event in [
                DestinationEvent::Verified,
                DestinationEvent::Commit,
                DestinationEvent::Fail,
            ] {
                assert_eq!(state.on(event), state);
            }
        }
    }

    #[test]
    fn every_transition_is_reached() {
        let worlds = worlds();
        for &(from, event, to) in SOURCE {
            assert!(worlds.iter().any(|w| w.source == to), "{from:?} {event:?}");
        }
        for &(from, event, to) in DESTINATION {
            assert!(
                worlds.iter().any(|w| w.destination == to),
                "{from:?} {event:?}"
            );
        }
    }
}
