//! The source's end of the connection: pages that are acknowledged, and the other side's clock.
//!
//! Without a way back nothing is acknowledged: what was written counts as loaded.

use std::time::Instant;

use super::board::{Board, Cancelled};
use super::channel::{Channel, Patience};
use super::clock::{Clock, Sample};
use super::flow::Flow;
use super::lanes::{Lanes, Round};
use super::oneway::FinishError;
use super::pace::{PACE, Pace};
use super::pages::{self, Pages, SendError};
use super::status::describe;
use super::stream::Error;
use super::stream::frame::Kind;
use super::stream::header::Shape;
use super::stream::mapped::Saver;
use super::stream::message::{
    Commit, Device, End, Join, Learned, Loaded, Message, Ping, Pong, Rehearsal, RoundEnd,
    RoundLoaded, Running, Terms, Token, Welcome,
};
use super::stream::ram::{Packer, Tally};
use super::vm::SavedDevice;
use super::wire::Wire;
use super::work::{self, Batch, Work};
use crate::costs::Costs;
use crate::memory::{GuestRam, PageRun};
use crate::probes;
use crate::runstate::RunState;
use crate::spanlog::{SpanRecord, monotonic_ns};

/// No more pages than this are sent over one connection also when there are several: it is done before
/// the others are awake.
const FRAME_PAGES: u64 = 64;
/// Clock samples before the first round.
const CLOCK_SAMPLES: u32 = 8;

/// Whether `commit` may have left this machine.
#[derive(Debug)]
pub(super) enum Committed {
    /// It may have; the error, if any, came after its first byte.
    Yes(Result<(), Error>),
    /// Not a byte of it was taken.
    No(Error),
}

/// The connection to a destination that has accepted the guest.
pub(super) struct Link {
    channel: Channel,
    terms: Terms,
    clock: Clock,
    /// This session's secret, which the destination echoes in `loaded`.
    token: Token,
    /// The destination's, for `commit`.
    their_token: Token,
    flow: Flow,
    /// Further connections for pages.
    lanes: Lanes,
    /// The file that pages have places in, if they have.
    saver: Option<Saver>,
    /// Payload bytes that were loaded from them.
    lane_bytes_loaded: u64,
    /// And that were sent over them.
    lane_bytes_sent: u64,
    /// What the destination's devices took when it tried.
    rehearsal: Vec<Rehearsal>,
    /// When `commit` was sent, for the clock.
    commit_ns: u64,
}

impl Link {
    /// Introduces the guest of migration `id`, whose memory is `ram`, over `wire`. If `pages` are to go
    /// over further connections too, the destination waits for [`Link::add_lane`] then.
    ///
    /// # Errors
    /// When the destination can't take the guest: [`Error::Peer`] has its reason.
    pub(super) fn open(
        wire: Wire,
        id: u64,
        token: Token,
        shape: &Shape,
        (ram, pages): (&GuestRam, Pages),
        patience: Patience,
    ) -> Result<Self, Error> {
        let failed = |source| Error::Write { offset: 0, source };
        let mut link = Link {
            terms: Terms {
                answered: wire.one_way().is_none(),
                shared: matches!(pages, Pages::Passed(_)),
                lanes: match pages {
                    Pages::Sent(lanes) => lanes,
                    Pages::Passed(_) | Pages::Mapped(_) => 0,
                },
                mapped: match pages {
                    Pages::Mapped(at) => Some(at),
                    Pages::Sent(_) | Pages::Passed(_) => None,
                },
            },
            channel: Channel::new(wire, patience).map_err(failed)?,
            clock: Clock::default(),
            token,
            their_token: Token::default(),
            flow: Flow::default(),
            lanes: Lanes::default(),
            saver: None,
            lane_bytes_loaded: 0,
            lane_bytes_sent: 0,
            rehearsal: Vec::new(),
            commit_ns: 0,
        };
        let greeted = link.greet(id, shape, ram, pages);
        match greeted.and_then(|()| link.channel.keep_alive().map_err(failed)) {
            Ok(()) => Ok(link),
            Err(error) => {
                link.give_up(describe(&error));
                Err(error)
            }
        }
    }

    fn greet(&mut self, id: u64, shape: &Shape, ram: &GuestRam, pages: Pages) -> Result<(), Error> {
        match &pages {
            Pages::Passed(memfd) => self.channel.send_preface_with(memfd)?,
            Pages::Sent(_) | Pages::Mapped(_) => self.channel.send_preface()?,
        }
        self.channel
            .send(&shape.hello(id, self.token, self.terms))?;
        if let Pages::Mapped(at) = pages {
            let place = self.channel.set_aside(at, ram);
            let saver = place.and_then(|place| Saver::new(place, ram));
            self.saver = Some(saver.map_err(|source| Error::Write { offset: at, source })?);
        }
        if !self.terms.answered {
            return Ok(());
        }
        self.channel.receive_preface()?;
        let welcome: Welcome = self.channel.receive()?.decode("the destination's answer")?;
        (self.their_token, self.rehearsal) = (welcome.token, welcome.rehearsal);
        Ok(())
    }

    /// Adds a further connection to the destination, for pages.
    ///
    /// # Errors
    /// When the destination does not take it.
    pub(super) fn add_lane(&mut self, wire: Wire, patience: Patience) -> Result<(), Error> {
        let failed = |source| Error::Write { offset: 0, source };
        let mut channel = Channel::new(wire.clone(), patience).map_err(failed)?;
        channel.send_preface()?;
        channel.send(&Join {
            token: self.their_token,
            lane: self.lanes.len(),
        })?;
        channel.receive_preface()?;
        let of = self.terms.lanes;
        self.lanes.add(wire, channel, of).map_err(failed)
    }

    /// Reads the other side's clock for the first time, if it can be heard.
    pub(super) fn meet_clock(&mut self) -> Result<(), Error> {
        for _ in 0..CLOCK_SAMPLES {
            self.read_clock()?;
        }
        Ok(())
    }

    /// Whether the destination can be heard. If not, [`Link::hand_over`] is how the guest leaves.
    pub(super) fn is_answered(&self) -> bool {
        self.terms.answered
    }

    /// Whether the destination has this side's RAM, so that no page is to be sent.
    pub(super) fn shares_ram(&self) -> bool {
        self.terms.shared
    }

    /// Takes a sample of the destination's clock, while nothing else is under way.
    pub(super) fn read_clock(&mut self) -> Result<(), Error> {
        if !self.terms.answered {
            return Ok(());
        }
        let t1 = monotonic_ns();
        self.channel.send(&Ping { t1 })?;
        self.channel.advance()?;
        let t4 = monotonic_ns();
        let frame = self.channel.current();
        let pong: Pong = frame.decode("the destination's time")?;
        if pong.t1 != t1 {
            return Err(frame.malformed("it answers another question".to_owned()));
        }
        self.note_clock(Sample {
            t1,
            t2: pong.t2,
            t3: pong.t3,
            t4,
        });
        Ok(())
    }

    fn note_clock(&mut self, sample: Sample) {
        if self.clock.add(sample) {
            probes::clock_sample(sample.t1, sample.t2, sample.t3, sample.t4);
        }
    }

    /// The other side's clock as known so far.
    pub(super) fn clock(&self) -> &Clock {
        &self.clock
    }

    /// What the destination's devices took on its machine, in their order; empty if it can't be heard.
    pub(super) fn rehearsal(&self) -> &[Rehearsal] {
        &self.rehearsal
    }

    /// Payload bytes of pages that the destination has loaded.
    pub(super) fn loaded_bytes(&self) -> u64 {
        self.flow.bytes_loaded() + self.lane_bytes_loaded
    }

    /// Sends the pages of a round, never more of them ahead of what the destination has loaded than
    /// the window allows, and keeps `board` up to date. The pages of `zeroes` are known to be that.
    pub(super) fn send_pages(
        &mut self,
        ram: &GuestRam,
        round: u32,
        zeroes: &[PageRun],
        runs: &[PageRun],
        pace: Pace,
        board: &Board,
    ) -> Result<Tally, SendError> {
        if let Some(saver) = &mut self.saver {
            let flow = &mut self.flow;
            let note = |tally| {
                flow.sent(tally);
                flow.all_loaded();
                board.update_ram(|ram| ram.sent(tally, flow.bytes_loaded()));
            };
            return pages::save(saver, ram, (zeroes, runs), pace, board, note);
        }
        let mut work = Work::new(zeroes, runs);
        let pages: u64 = [zeroes, runs].concat().iter().map(|run| run.pages).sum();
        if !self.lanes.is_empty() && pages > FRAME_PAGES {
            return self.send_over_lanes(ram, round, work, pace, board);
        }
        let (mut packer, mut batch) = (Packer::new(round), Batch::default());
        let mut sent = Tally::default();
        let began = Instant::now();
        while work::fill(ram, &mut packer, &mut batch, |room, batch| {
            work.take(room, batch)
        })? {
            sent.add(self.send_packed(&mut packer, board)?);
            pace.keep(sent, began, board)?;
        }
        Ok(sent)
    }

    fn send_packed(&mut self, packer: &mut Packer, board: &Board) -> Result<Tally, Error> {
        self.flow.make_room(&mut self.channel)?;
        let tally = packer.tally();
        self.channel.send_ram(packer.frame())?;
        packer.clear();
        self.flow.sent(tally);
        if !self.terms.answered {
            self.flow.all_loaded();
        }
        board.update_ram(|ram| ram.sent(tally, self.loaded_bytes()));
        Ok(tally)
    }

    /// Lets the lanes send a round, and keeps `board` up to date meanwhile.
    fn send_over_lanes(
        &mut self,
        ram: &GuestRam,
        number: u32,
        work: Work,
        pace: Pace,
        board: &Board,
    ) -> Result<Tally, SendError> {
        let round = Round::new(ram.clone(), number, work, pace == Pace::Limited);
        let before = self.lane_bytes_loaded;
        let mut sent = Tally::default();
        let began = Instant::now();
        self.lanes.start(&round);
        loop {
            let allowed = pace.allowed(began, board);
            let progress = match board.is_cancelled() {
                true => Err(Cancelled.into()),
                false => round.wait(allowed, PACE).map_err(SendError::from),
            };
            let progress = progress.inspect_err(|_| round.give_up())?;
            let more = progress.sent.since(sent);
            sent = progress.sent;
            self.lane_bytes_loaded = before + progress.loaded;
            board.update_ram(|ram| {
                ram.sent(more, self.loaded_bytes());
                ram.multifd_bytes += more.bytes;
            });
            if progress.over {
                self.lane_bytes_sent += sent.bytes;
                return Ok(sent);
            }
        }
    }

    /// Ends a round and waits until the destination has loaded all of it.
    pub(super) fn finish_round(&mut self, round: u32, sent: Tally) -> Result<(), Error> {
        if self.saver.is_some() {
            return self.channel.sync();
        }
        let (pages, last, checksum) = (sent.pages, false, None);
        self.channel.send(&RoundEnd {
            round,
            pages,
            last,
            checksum,
        })?;
        if !self.terms.answered {
            // The rate of a round then is the disk's, and little is left for the stop.
            return self.channel.sync();
        }
        let loaded: RoundLoaded = self.receive("the end of a round")?;
        if loaded.round != round || !self.flow.is_drained() {
            let problem = format!("round {round} is not loaded");
            return Err(self.channel.current().malformed(problem));
        }
        Ok(())
    }

    /// Ends the round after the stop, which is not answered.
    pub(super) fn finish_last_round(
        &mut self,
        round: u32,
        sent: Tally,
        checksum: Option<u32>,
    ) -> Result<(), Error> {
        let (round, pages) = match &self.saver {
            None => (round, sent.pages),
            Some(saver) => (
                1,
                saver.tell(|packer| self.channel.send_ram(packer.frame()))?,
            ),
        };
        self.channel.send(&RoundEnd {
            round,
            pages,
            last: true,
            checksum,
        })
    }

    /// Sends a device's state.
    pub(super) fn send_device(&mut self, device: &SavedDevice) -> Result<(), Error> {
        let name = &device.name.to_string_lossy();
        self.channel.send(&Device {
            name,
            version: device.version,
            state: &device.state,
        })
    }

    /// Says that everything was sent, and in which run state the guest is to go on.
    pub(super) fn send_end(&mut self, state: RunState) -> Result<(), Error> {
        self.channel.send(&End {
            state: state.name().to_owned(),
        })
    }

    /// Waits until the destination says something else than that it has loaded pages.
    pub(super) fn wait_for_answer(&mut self) -> Result<(), Error> {
        while self.channel.advance()? == Kind::Ack {
            self.flow.acknowledge(&self.channel)?;
        }
        Ok(())
    }

    /// Checks that what it said is that everything is loaded and verified.
    pub(super) fn check_loaded(&mut self) -> Result<(), Error> {
        let frame = self.channel.current();
        let loaded: Loaded = frame.decode("the word that everything is loaded")?;
        if loaded.token != self.token {
            return Err(frame.malformed("it is of another session".to_owned()));
        }
        // Of a last round over lanes nobody reads the acknowledgements.
        self.lane_bytes_loaded = self.lane_bytes_sent;
        Ok(())
    }

    /// Finds out, without waiting, that the destination has gone.
    ///
    /// # Errors
    /// Its reason, if it gave one.
    pub(super) fn check_peer(&mut self) -> Result<(), Error> {
        if !self.channel.is_broken() {
            return Ok(());
        }
        let offset = self.channel.received_bytes();
        let place = "where the destination should wait for the source";
        let error = Error::Truncated { offset, place };
        Err(self.channel.explain(error))
    }

    /// Hands the guest over, unless the destination has gone already.
    pub(super) fn send_commit(&mut self) -> Committed {
        if let Err(error) = self.check_peer() {
            return Committed::No(error);
        }
        self.commit_ns = monotonic_ns();
        let token = self.their_token;
        match self.channel.try_send(&Commit { token }) {
            (Err(error), false) => Committed::No(error),
            (sent, _) => Committed::Yes(sent),
        }
    }

    /// Hands the guest over to a stream that nobody answers: its end is the commit. What can fail
    /// before is done before: everything else is on the disk then.
    pub(super) fn hand_over(&mut self, state: RunState) -> Committed {
        let state = state.name().to_owned();
        match self.channel.try_send(&End { state }) {
            (Err(error), false) => Committed::No(error),
            (sent, _) => Committed::Yes(sent),
        }
    }

    /// Waits until everything before the end is where it is to be, and sees to it that the end is
    /// the last message.
    pub(super) fn prepare_hand_over(&mut self) -> Result<(), Error> {
        self.channel.fall_silent();
        self.channel.sync()
    }

    /// Makes sure that the guest was taken, as far as that can be known without an answer.
    pub(super) fn finish(&self) -> Result<(), FinishError> {
        self.channel.finish()
    }

    /// Takes back what was written. Says whether it is certain that nobody finds a guest there.
    pub(super) fn take_back(&self) -> bool {
        self.channel.retract().unwrap_or_else(|error| {
            tracing::warn!("the guest that was saved can't be removed: {error}");
            false
        })
    }

    /// Waits until the destination has the guest. Returns when its first vCPU entered `KVM_RUN`, on
    /// the destination's clock, and what the destination did.
    pub(super) fn wait_running(&mut self) -> Result<(Option<u64>, Vec<SpanRecord>), Error> {
        let running: Running = self.receive("the word that the guest runs")?;
        let (t1, t4) = (self.commit_ns, monotonic_ns());
        self.note_clock(Sample {
            t1,
            t2: running.received_ns,
            t3: running.sent_ns,
            t4,
        });
        Ok((running.first_run_ns, running.spans))
    }

    /// Tells the destination what it took, so that it can predict its own stop of this guest. The end of
    /// the session.
    pub(super) fn farewell(mut self, costs: Costs) {
        if !self.terms.answered {
            return;
        }
        self.channel.fall_silent();
        if let Err(error) = self.channel.send(&Learned { costs }) {
            tracing::debug!("the destination does not know what the stop took: {error}");
        }
    }

    /// Tells the destination that it won't get the guest.
    pub(super) fn give_up(self, reason: String) {
        if !self.take_back() {
            self.channel.give_up(reason, Vec::new());
        }
    }

    /// Receives a message, and the acknowledgements before it.
    fn receive<M: for<'de> Message<'de>>(&mut self, expected: &'static str) -> Result<M, Error> {
        self.wait_for_answer()?;
        self.channel.current().decode(expected)
    }
}
