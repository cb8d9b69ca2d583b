//! The destination's end of the connection: what arrives is checked, loaded and answered, in the
//! one order that there is.

use std::ffi::CString;

use super::board::Board;
use super::channel::{Channel, Patience};
use super::commit::{Destination, DestinationEvent};
use super::incoming::{Door, Error, finished};
use super::intake::Intake;
use super::lanes::MAX_LANES;
use super::loaders::{LoadedFrame, Loaders};
use super::settings::Mode;
use super::status::MigrationStatus;
use super::stream;
use super::stream::frame::{Frame, Kind};
use super::stream::mapped::Place;
use super::stream::message::{
    Ack, Commit, Device, End, Hello, Learned, Loaded, Message, Ping, Pong, RoundEnd, RoundLoaded,
    Running, Token, Welcome,
};
use super::stream::ram::{self, LoadError, Tally};
use super::vm::TargetVm;
use crate::memory::handover::Adopted;
use crate::memory::{Filling, GuestRam, PAGE_SIZE};
use crate::probes::{self, Guarded};
use crate::runstate::RunState;
use crate::spanlog::{SpanLog, SpanRecord, monotonic_ns};

/// Run states that a guest can arrive in.
const ARRIVALS: [RunState; 5] = [
    RunState::Running,
    RunState::Paused,
    RunState::Prelaunch,
    RunState::Shutdown,
    RunState::InternalError,
];

/// One connection to a source.
pub(super) struct Receiver<'a, V> {
    vm: &'a V,
    channel: Channel,
    /// This side's secret, which the source echoes in `commit`.
    token: Token,
    /// The source's, for `loaded`.
    their_token: Token,
    commit: Destination,
    /// Whether the source hears what this side says.
    answered: bool,
    id: u64,
    ram: GuestRam,
    /// Given back unless the guest runs here.
    adopted: Option<Adopted>,
    /// Where the pages are, if the stream only says what they are.
    place: Option<Place>,
    /// Further connections for pages, if there are any.
    intake: Option<Intake>,
    /// Threads for the first round, while it lasts.
    loaders: Option<Loaders>,
    /// RAM that has no pages yet, as long as the first round lasts.
    filling: Option<Filling>,
    patience: Patience,
    /// The round that is being loaded or comes next.
    round: u32,
    /// Whether the last round is loaded.
    ram_complete: bool,
    /// The devices in machine order.
    devices: Vec<CString>,
    /// How many of them have been touched.
    devices_begun: usize,
    /// Payload bytes of all `ram` frames so far.
    bytes_loaded: u64,
    first_run_ns: Option<u64>,
}

impl<'a, V: TargetVm> Receiver<'a, V> {
    /// A session on a connection that was just accepted; `token` is its secret.
    pub(super) fn new(vm: &'a V, channel: Channel, token: Token) -> Self {
        Receiver {
            answered: channel.has_way_back(),
            vm,
            channel,
            token,
            their_token: Token::default(),
            commit: Destination::Receiving,
            id: 0,
            ram: vm.ram(),
            adopted: None,
            place: None,
            intake: None,
            loaders: None,
            filling: None,
            patience: Patience::default(),
            round: 1,
            ram_complete: false,
            devices: vm.shape().device_names(),
            devices_begun: 0,
            bytes_loaded: 0,
            first_run_ns: None,
        }
    }

    /// The migration's id; 0 before the source has said it.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// When the guest's first vCPU entered `KVM_RUN` here.
    pub(super) fn first_run_ns(&self) -> Option<u64> {
        self.first_run_ns
    }

    /// Takes the guest in and starts it.
    ///
    /// # Errors
    /// Whatever went wrong; the guest has not run here and never will.
    pub(super) fn run(
        &mut self,
        door: Door<'_>,
        board: &Board,
        log: &SpanLog,
    ) -> Result<(), Error> {
        self.patience = door.patience();
        self.greet(door, board)?;
        board.set_status(MigrationStatus::Active);
        self.filling = self.adopted.is_none().then(|| self.ram.fill());
        let loaded = self.load(board);
        // The source only says what this side has told it of a connection that broke.
        let broken = self.intake.as_ref().and_then(Intake::take_error);
        broken.map_or(Ok(()), Err)?;
        loaded?;
        let state = self.verify(board)?;
        // Without a way back, the end of the stream was the commit.
        let received_ns = match self.answered {
            true => self.wait_commit()?,
            false => monotonic_ns(),
        };
        self.first_run_ns = self.vm.go_on(state)?;
        if let Some(adopted) = self.adopted.take() {
            adopted.keep();
        }
        self.commit = self.commit.on(DestinationEvent::Commit);

        let first_run_ns = self.first_run_ns;
        let spans = finished(log);
        let sent_ns = monotonic_ns();
        let running = Running {
            received_ns,
            first_run_ns,
            sent_ns,
            spans,
        };
        if let Err(error) = self.answer(&running) {
            // The guest is here all the same; it is the source that will not know.
            tracing::warn!("the source was not told that the guest runs: {error}");
        }
        self.vm.settle();
        if self.answered {
            self.learn();
        }
        Ok(())
    }

    /// Hears from the source what the stop has cost there, for the next one, which is this side's.
    fn learn(&mut self) {
        let learned = self.channel.receive_farewell();
        let learned =
            learned.and_then(|frame| frame.decode::<Learned>("what the source has learned"));
        match learned {
            Ok(Learned { costs }) if costs.is_sane() => self.vm.learn(&costs),
            Ok(_) => tracing::warn!("the source has learned more than a guest can teach"),
            Err(error) => tracing::debug!("nothing is known of the stop at the source: {error}"),
        }
    }

    /// Everything is in place, and `end` has arrived: checks it, and returns the run state that the
    /// guest comes in. From here on it is the source that decides.
    fn verify(&mut self, board: &Board) -> Result<RunState, Error> {
        probes::migration_verify(self.id).run(|_| {
            let state = self.end()?;
            self.commit = self.commit.on(DestinationEvent::Verified);
            board.seal()?;
            let token = self.their_token;
            self.answer(&Loaded { token })?;
            Ok(state)
        })
    }

    /// Tells the source that this side does not take the guest, and sees to it that it can't.
    pub(super) fn give_up(mut self, reason: String, spans: Vec<SpanRecord>) {
        self.intake = None;
        self.loaders = None;
        // The source lets the guest go on once it hears of this.
        self.adopted = None;
        self.commit = self.commit.on(DestinationEvent::Fail);
        if self.commit == Destination::Failed && self.devices_begun > 0 {
            self.vm.spoil();
        }
        self.filling = None;
        if self.answered {
            self.channel.give_up(reason, spans);
        }
        // What has arrived is nobody's, and the next guest's RAM comes where there is none.
        if let Err(error) = self.ram.clear() {
            tracing::warn!("guest RAM that has arrived is kept: {error}");
        }
    }

    /// Learns what the source has, and accepts it.
    fn greet(&mut self, door: Door<'_>, board: &Board) -> Result<(), Error> {
        let passed = self.channel.receive_passed();
        // A peer of another version must learn of this one's; one that is gone is the better error.
        let theirs = self.channel.receive_preface();
        if self.answered {
            let ours = self.channel.send_preface();
            theirs.and(ours)?;
        } else {
            theirs?;
        }
        let hello: Hello = self
            .channel
            .receive()?
            .decode("the source's introduction")?;
        if hello.terms.answered && !self.answered {
            return Err(Error::NoWayBack);
        }
        self.answered = hello.terms.answered;
        self.vm.shape().accepts(&hello)?;
        if hello.terms.shared {
            board.set_mode(Mode::CprTransfer);
            let theirs = passed.ok_or(Error::NoRam)?;
            self.adopted = Some(self.ram.adopt(theirs)?);
        }
        if let Some(at) = hello.terms.mapped {
            let place = self.channel.set_aside(at, &self.ram);
            self.place = Some(place.map_err(Error::NotSeekable)?);
        }
        (self.id, self.their_token) = (hello.id, hello.token);
        if !self.answered {
            return Ok(());
        }
        let lanes = hello.terms.lanes;
        if lanes > MAX_LANES {
            return Err(Error::TooManyLanes(lanes));
        }
        let rehearsal = self.vm.rehearse();
        let token = self.token;
        self.channel.send(&Welcome { token, rehearsal })?;
        self.channel.keep_alive().map_err(Error::Session)?;
        if lanes > 0 {
            let ram = self.ram.clone();
            self.intake = door.accept(lanes, self.token, ram, board)?;
            if self.intake.is_none() {
                let last = self.channel.receive()?;
                return Err(last.unexpected("a connection for pages").into());
            }
        }
        Ok(())
    }

    /// Tells the source something, if it hears.
    fn answer<'m, M: Message<'m>>(&mut self, message: &M) -> Result<(), stream::Error> {
        match self.answered {
            true => self.channel.send(message),
            false => Ok(()),
        }
    }

    /// Loads everything up to `end`, which has arrived when this returns.
    fn load(&mut self, board: &Board) -> Result<(), Error> {
        loop {
            let kind = self.channel.advance()?;
            let now_ns = monotonic_ns();
            match kind {
                Kind::Ping => self.tell_time(now_ns)?,
                Kind::Ram | Kind::RoundEnd if !self.ram_complete => {
                    self.load_round()?;
                    if self.ram_complete {
                        board.set_status(MigrationStatus::Device);
                    }
                }
                Kind::Device if self.ram_complete => self.load_device()?,
                Kind::End if self.devices_begun == self.devices.len() => return Ok(()),
                _ => {
                    let expected = match (self.ram_complete, self.devices_begun) {
                        (false, _) => "a page",
                        (true, begun) if begun < self.devices.len() => "a device",
                        (true, _) => "the end",
                    };
                    return Err(self.channel.current().unexpected(expected).into());
                }
            }
        }
    }

    fn tell_time(&mut self, t2: u64) -> Result<(), Error> {
        let Ping { t1 } = self.channel.current().decode("a question for the time")?;
        Ok(self.answer(&Pong {
            t1,
            t2,
            t3: monotonic_ns(),
        })?)
    }

    /// Loads a round, whose first frame has arrived, to its end.
    fn load_round(&mut self) -> Result<(), Error> {
        probes::ram_load(self.round.into()).run(|span| {
            let mut tally = Tally::default();
            while self.channel.current().kind == Kind::Ram {
                self.load_pages(&mut tally)?;
                (span.pages, span.bytes) = (tally.pages, tally.bytes);
                self.channel.advance()?;
            }
            if let Some(mut loaders) = self.loaders.take() {
                while let Some(loaded) = loaders.wait().map_err(Error::Session)? {
                    self.acknowledge(loaded, &mut tally)?;
                }
            }
            let all = self.end_round(tally)?;
            (span.pages, span.bytes) = (all.pages, all.bytes);
            Ok(())
        })
    }

    /// Loads the frame of pages that has just arrived, or has it loaded, and adds what is loaded.
    fn load_pages(&mut self, tally: &mut Tally) -> Result<(), Error> {
        let alone = self.intake.is_none() && self.place.is_none() && self.adopted.is_none();
        if self.round == 1 && alone && self.loaders.is_none() {
            self.loaders = Some(Loaders::start(&self.ram).map_err(Error::Session)?);
        }
        let loaded = match &mut self.loaders {
            Some(loaders) => {
                let (offset, payload) = self.channel.take(loaders.buffer());
                loaders.load(offset, payload).map_err(Error::Session)?
            }
            None => {
                let Frame {
                    offset, payload, ..
                } = self.channel.current();
                let place = self.place.as_ref();
                let result = ram::load(&self.ram, payload, place);
                Some(LoadedFrame { offset, result })
            }
        };
        loaded.map_or(Ok(()), |loaded| self.acknowledge(loaded, tally))
    }

    /// Adds what was in a frame of pages, and tells the source that it is loaded.
    fn acknowledge(&mut self, loaded: LoadedFrame, tally: &mut Tally) -> Result<(), Error> {
        let frame = Frame {
            kind: Kind::Ram,
            offset: loaded.offset,
            payload: &[],
        };
        let (round, more) = loaded.result.map_err(|error| match error {
            LoadError::Malformed(problem) => Error::from(frame.malformed(problem.to_owned())),
            LoadError::Memory(source) => source.into(),
            LoadError::Mapped(source) => source.into(),
        })?;
        if round != self.round {
            let problem = format!("it is of round {round}, in round {}", self.round);
            return Err(frame.malformed(problem).into());
        }
        self.bytes_loaded += more.bytes;
        tally.add(more);
        let bytes = self.bytes_loaded;
        Ok(self.answer(&Ack { bytes })?)
    }

    fn end_round(&mut self, mut tally: Tally) -> Result<Tally, Error> {
        let frame = self.channel.current();
        let end: RoundEnd = frame.decode("a page or the end of a round")?;
        if let Some(intake) = &self.intake {
            let elsewhere = end.pages.saturating_sub(tally.pages);
            let more = intake.end_round(elsewhere, end.last, self.patience.silence)?;
            tally.add(more);
        }
        let all = self.ram.size() / PAGE_SIZE;
        let problem = if (end.round, end.pages) != (self.round, tally.pages) {
            let RoundEnd { round, pages, .. } = end;
            let (ours, loaded) = (self.round, tally.pages);
            Some(format!(
                "round {round} has {pages} pages, {loaded} of round {ours} arrived"
            ))
        } else if end.round == 1 && self.adopted.is_none() && end.pages != all {
            Some(format!("the first round has {} pages of {all}", end.pages))
        } else {
            None
        };
        if let Some(problem) = problem {
            return Err(frame.malformed(problem).into());
        }
        self.filling = None;
        self.round = self.round.wrapping_add(1);
        if !end.last {
            self.answer(&RoundLoaded { round: end.round })?;
            return Ok(tally);
        }
        self.ram_complete = true;
        if let Some(there) = end.checksum {
            let here = self.ram.checksum()?;
            if here != there {
                return Err(Error::Checksum { here, there });
            }
        }
        Ok(tally)
    }

    fn load_device(&mut self) -> Result<(), Error> {
        let frame = self.channel.current();
        let device: Device<'_> = frame.decode("a device")?;
        let index = self.devices_begun;
        let due = self
            .devices
            .get(index)
            .filter(|due| due.to_bytes() == device.name.as_bytes());
        let Some(name) = due else {
            let found = device.name.to_owned();
            return Err(frame
                .malformed(format!("{found} is not the device that is due"))
                .into());
        };
        self.devices_begun += 1;
        probes::device_load(name).run(|span| {
            span.bytes = device.state.len() as u64;
            let loaded = self.vm.load_device(index, device.version, device.state);
            loaded.map_err(|source| Error::LoadDevice {
                name: device.name.to_owned(),
                source,
            })
        })
    }

    fn end(&mut self) -> Result<RunState, Error> {
        let frame = self.channel.current();
        let End { state } = frame.decode("the end")?;
        let known = ARRIVALS.into_iter().find(|known| known.name() == state);
        Ok(known.ok_or_else(|| frame.malformed(format!("a guest can't be {state}")))?)
    }

    /// Waits for the source to hand the guest over, and returns when it did.
    fn wait_commit(&mut self) -> Result<u64, Error> {
        probes::switchover(self.id)
            .run(|_| {
                self.channel.advance()?;
                let received_ns = monotonic_ns();
                let frame = self.channel.current();
                let Commit { token } = frame.decode("the commit")?;
                if token != self.token {
                    return Err(frame.malformed("it is of another session".to_owned()));
                }
                Ok::<_, stream::Error>(received_ns)
            })
            .map_err(Error::from)
    }
}
