//! The server over a real socket, with a monitor that has no VM behind it.

use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use tempfile::TempDir;

#[path = "../../../tests/qmp/transcript.rs"]
mod transcript;

use super::commands::VERBS;
use super::hub::BACKLOG;
use super::server::MAX_CLIENTS;
use super::*;
use crate::migration::descriptors::Descriptors;
use crate::migration::settings::{Capability, Settings};
use crate::migration::status::{MigrationStatus, QueryMigrate};
use crate::migration::uri::Uri;
use crate::runstate::{Event, EventSender, RunState};

/// A monitor that only keeps a run state.
struct Fake {
    state: Mutex<RunState>,
    events: EventSender,
    calls: Sender<String>,
    settings: Settings,
}

impl Fake {
    fn call(&self, what: &str) {
        self.calls.send(what.to_owned()).unwrap();
    }
}

impl Backend for Fake {
    fn name(&self) -> Option<&str> {
        Some("vm")
    }

    fn run_state(&self) -> RunState {
        *self.state.lock().unwrap()
    }

    fn change(&self, decide: fn(RunState) -> Result<Change, Error>) -> Result<(), Error> {
        let mut state = self.state.lock().unwrap();
        match decide(*state)? {
            Change::Nothing => {}
            Change::Autostart(on) => self.call(&format!("autostart {on}")),
            Change::Start => {
                *state = RunState::Running;
                self.events.send(Event::Resume);
            }
            Change::Stop => {
                *state = RunState::Paused;
                self.events.send(Event::Stop);
            }
        }
        Ok(())
    }

    fn system_reset(&self) -> Result<(), Error> {
        self.call("system_reset");
        self.events.send(Event::Reset {
            guest: false,
            reason: "host-qmp-system-reset",
        });
        Ok(())
    }

    fn system_powerdown(&self) -> Result<(), Error> {
        self.call("system_powerdown");
        self.events.send(Event::Powerdown);
        Ok(())
    }

    fn migrate(&self, uri: &str, descriptors: &mut Descriptors) -> Result<(), Error> {
        if let Some(name) = uri.strip_prefix("fd:") {
            descriptors.take(name)?;
        }
        Uri::outgoing(uri).map_err(crate::migration::Error::from)?;
        self.call(&format!("migrate {uri}"));
        Ok(())
    }

    fn migrate_incoming(&self, uri: &str, _: &mut Descriptors) -> Result<(), Error> {
        self.call(&format!("migrate-incoming {uri}"));
        Ok(())
    }

    fn settings(&self) -> &Settings {
        &self.settings
    }

    fn set_capabilities(&self, changes: &[(Capability, bool)]) -> Result<(), Error> {
        self.settings.set_capabilities(changes);
        Ok(())
    }

    fn migrate_continue(&self, _: MigrationStatus) -> Result<(), Error> {
        Err(crate::migration::Error::NotInState(None).into())
    }

    fn migrate_cancel(&self) {
        self.call("migrate_cancel");
    }

    fn query_migrate(&self) -> QueryMigrate {
        QueryMigrate::default()
    }

    fn quit(&self) {
        self.call("quit");
    }
}

struct Bench {
    _folder: TempDir,
    address: Address,
    fake: Arc<Fake>,
    calls: Receiver<String>,
    server: Server,
}

impl Bench {
    fn start(state: RunState) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp.sock");
        let address = Address { path };
        let hub = Hub::start().unwrap();
        let (sender, calls) = mpsc::channel();
        let fake = Arc::new(Fake {
            state: Mutex::new(state),
            events: hub.events(),
            calls: sender,
            settings: Settings::default(),
        });
        let server = Server::start(&address, Arc::clone(&fake) as _, hub).unwrap();
        Bench {
            _folder: folder,
            address,
            fake,
            calls,
            server,
        }
    }

    /// A client that has read its greeting.
    fn connect(&self) -> Client {
        let stream = UnixStream::connect(&self.address.path).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let mut client = Client(BufReader::new(stream));
        assert!(client.read()["QMP"]["version"]["qemu"]["major"].is_u64());
        client
    }

    /// A client that has negotiated.
    fn join(&self) -> Client {
        let mut client = self.connect();
        let answer = client.ask(r#"{"execute":"qmp_capabilities"}"#);
        assert_eq!(answer, json!({ "return": {} }));
        client
    }
}

struct Client(BufReader<UnixStream>);

impl Client {
    fn send(&mut self, text: &str) {
        self.0.get_mut().write_all(text.as_bytes()).unwrap();
    }

    /// Sends `text` with a descriptor.
    fn pass(&mut self, text: &str, fd: &impl AsFd) {
        let fds = [fd.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut passed = SendAncillaryBuffer::new(&mut space);
        assert!(passed.push(SendAncillaryMessage::ScmRights(&fds)));
        let parts = [IoSlice::new(text.as_bytes())];
        sendmsg(self.0.get_ref(), &parts, &mut passed, SendFlags::empty()).unwrap();
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line
    }

    fn read(&mut self) -> Value {
        let line = self.line();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }

    fn ask(&mut self, text: &str) -> Value {
        self.send(text);
        self.read()
    }
}

#[test]
fn the_dialogue_is_qemus() {
    let bench = Bench::start(RunState::Prelaunch);
    let mut client = bench.connect();
    for row in transcript::rows() {
        client.send(&row.request);
        for qemus in row.answers {
            let ours = client.read();
            let request = &row.request;
            assert!(
                transcript::agrees(&ours, &qemus),
                "{request}: {ours}, QEMU: {qemus}"
            );
        }
    }
}

#[test]
fn lines_are_spaced_as_qemus() {
    let bench = Bench::start(RunState::Prelaunch);
    let mut client = bench.join();
    client.send(r#"{"execute":"query-status","id":[1,2]}"#);
    assert_eq!(
        client.line(),
        "{\"return\": {\"running\": false, \"status\": \"prelaunch\"}, \"id\": [1, 2]}\r\n"
    );
}

#[test]
fn what_qemu_offers_and_this_does_not_is_refused() {
    let bench = Bench::start(RunState::Prelaunch);
    let mut client = bench.connect();
    let enable = r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#;
    let refused = client.ask(enable);
    assert_eq!(refused["error"]["desc"], "Capability oob not available");
    client.ask(r#"{"execute":"qmp_capabilities"}"#);
    let refused = client.ask(r#"{"exec-oob":"query-status"}"#);
    let expected = "QMP input member 'exec-oob' is unexpected";
    assert_eq!(refused["error"]["desc"], expected);
}

#[test]
fn every_verb_refuses_an_argument_that_it_does_not_have() {
    let bench = Bench::start(RunState::Running);
    let mut client = bench.join();
    let verbs = client.ask(r#"{"execute":"query-commands"}"#);
    assert_eq!(verbs["return"].as_array().unwrap().len(), VERBS.len());
    for verb in verbs["return"].as_array().unwrap() {
        if verb["name"] == "qmp_capabilities" {
            continue;
        }
        // What some verb must have is there, and too much for all others.
        let arguments = json!({
            "uri": "x", "state": "active", "capabilities": [], "fdname": "x",
            "qom-type": "tls-creds-x509", "id": "x", "zz": 1
        });
        let request = json!({ "execute": verb["name"], "arguments": arguments });
        let answer = client.ask(&request.to_string());
        let expected = answer["error"]["desc"].as_str().unwrap_or_default();
        assert!(expected.ends_with("is unexpected"), "{verb}: {answer}");
    }
    assert!(bench.calls.try_recv().is_err(), "a verb ran all the same");
}

#[test]
fn a_descriptor_is_the_clients_that_passed_it() {
    let bench = Bench::start(RunState::Running);
    let (mut first, mut second) = (bench.join(), bench.join());
    let getfd = r#"{"execute":"getfd","arguments":{"fdname":"way"}}"#;
    let migrate = r#"{"execute":"migrate","arguments":{"uri":"fd:way"}}"#;
    let none = "File descriptor named 'way' has not been found";
    let pipe = std::io::pipe().unwrap();
    first.pass(getfd, &pipe.1);
    assert_eq!(first.read()["return"], json!({}));
    assert_eq!(second.ask(migrate)["error"]["desc"], none);
    assert_eq!(first.ask(migrate)["return"], json!({}));
    assert_eq!(bench.calls.recv().unwrap(), "migrate fd:way");
    assert_eq!(first.ask(migrate)["error"]["desc"], none);

    first.pass(getfd, &pipe.1);
    assert_eq!(first.read()["return"], json!({}));
    drop((pipe.1, first));
    let mut rest = Vec::new();
    let mut reader = pipe.0;
    // Every end for writing is closed: the one that was taken, and the one that its client left.
    assert_eq!(reader.read_to_end(&mut rest).unwrap(), 0);
}

#[test]
fn cont_and_stop_follow_the_run_state() {
    const RESET: &str = "Resetting the Virtual Machine is required";
    const UNFINISHED: &str = "Migration is not finalized yet";
    let rows = [
        (RunState::Prelaunch, "cont", Ok("running")),
        (RunState::Paused, "cont", Ok("running")),
        (RunState::Postmigrate, "cont", Ok("running")),
        (RunState::Inmigrate, "cont", Ok("inmigrate")),
        (RunState::FinishMigrate, "cont", Err(UNFINISHED)),
        (RunState::Shutdown, "cont", Err(RESET)),
        (RunState::InternalError, "cont", Err(RESET)),
        (RunState::Postmigrate, "stop", Ok("postmigrate")),
        (RunState::Shutdown, "stop", Ok("shutdown")),
        (RunState::Inmigrate, "stop", Ok("inmigrate")),
    ];
    let bench = Bench::start(RunState::Prelaunch);
    for (state, verb, expected) in rows {
        *bench.fake.state.lock().unwrap() = state;
        let mut client = bench.join();
        let mut answer = client.ask(&format!("{{\"execute\":\"{verb}\"}}"));
        if answer.get("event").is_some() {
            answer = client.read();
        }
        match expected {
            Ok(after) => assert_eq!(bench.fake.run_state().name(), after, "{verb} in {state:?}"),
            Err(text) => assert_eq!(answer["error"]["desc"], text, "{verb} in {state:?}"),
        }
    }
    let calls: Vec<_> = bench.calls.try_iter().collect();
    assert_eq!(calls, ["autostart true", "autostart false"]);
}

#[test]
fn events_go_to_every_client_that_has_negotiated() {
    let bench = Bench::start(RunState::Running);
    let (mut first, mut second, mut silent) = (bench.join(), bench.join(), bench.connect());
    bench.fake.events.send(Event::Migration("setup"));
    let (guest, reason) = (true, "guest-shutdown");
    bench.fake.events.send(Event::Shutdown { guest, reason });
    for client in [&mut first, &mut second] {
        let migration = client.read();
        assert_eq!(migration["event"], "MIGRATION");
        assert_eq!(migration["data"], json!({ "status": "setup" }));
        let shutdown = client.read();
        assert_eq!(shutdown["event"], "SHUTDOWN");
        let data = json!({ "guest": true, "reason": "guest-shutdown" });
        assert_eq!(shutdown["data"], data);
    }
    let answer = silent.ask("{}");
    assert!(answer.get("error").is_some(), "{answer}");
}

#[test]
fn an_event_that_is_held_keeps_its_place() {
    let bench = Bench::start(RunState::Running);
    let mut client = bench.join();
    let events = &bench.fake.events;
    events.hold(Event::Stop);
    let stream = client.0.get_ref();
    stream
        .set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    assert!(client.0.fill_buf().is_err(), "it was not held");
    events.release();
    assert_eq!(client.read()["event"], "STOP");
    // Whatever else is said releases it, the answer to a question too.
    events.hold(Event::Stop);
    events.send(Event::Resume);
    assert_eq!(client.read()["event"], "STOP");
    assert_eq!(client.read()["event"], "RESUME");
    events.hold(Event::Stop);
    client.send(r#"{"execute":"query-status"}"#);
    assert_eq!(client.read()["event"], "STOP");
    assert_eq!(client.read()["return"]["running"], true);
}

#[test]
fn a_client_that_does_not_read_is_dropped_and_harms_nobody() {
    let bench = Bench::start(RunState::Running);
    let mut deaf = bench.join();
    let mut other = bench.join();
    // A socket's buffer takes some hundred lines before the backlog begins to fill.
    for _ in 0..BACKLOG * 32 {
        bench.fake.events.send(Event::Stop);
        assert_eq!(other.read()["event"], "STOP");
    }
    let answer = other.ask(r#"{"execute":"query-kvm"}"#);
    assert_eq!(answer["return"]["present"], true);
    let mut rest = Vec::new();
    deaf.0.read_to_end(&mut rest).unwrap();
    let lines = rest.iter().filter(|&&byte| byte == b'\n').count();
    assert!(lines < BACKLOG * 32, "nothing was dropped");
}

#[test]
fn a_client_that_asks_more_than_it_reads_loses_nothing() {
    let bench = Bench::start(RunState::Running);
    let mut client = bench.join();
    let mut writing = client.0.get_ref().try_clone().unwrap();
    let count = BACKLOG * 32;
    let asking = std::thread::spawn(move || {
        for id in 0..count {
            let request = format!("{{\"execute\":\"query-kvm\",\"id\":{id}}}");
            writing.write_all(request.as_bytes()).unwrap();
        }
    });
    std::thread::sleep(Duration::from_millis(100));
    for id in 0..count {
        assert_eq!(client.read()["id"], id);
    }
    asking.join().unwrap();
}

#[test]
fn quit_is_answered_first_and_the_end_reaches_the_clients() {
    let bench = Bench::start(RunState::Running);
    let mut client = bench.join();
    assert_eq!(client.ask(r#"{"execute":"quit"}"#), json!({ "return": {} }));
    assert_eq!(bench.calls.recv().unwrap(), "quit");
    let (guest, reason) = (false, "host-qmp-quit");
    bench.fake.events.send(Event::Shutdown { guest, reason });
    drop(bench.server);
    assert_eq!(client.read()["data"]["reason"], reason);
    assert_eq!(client.line(), "", "the connection is closed");
    assert!(!bench.address.path.exists(), "the socket is still there");
}

#[test]
fn the_number_of_clients_is_bounded() {
    let bench = Bench::start(RunState::Running);
    let mut clients: Vec<_> = (0..MAX_CLIENTS).map(|_| bench.connect()).collect();
    let mut further = UnixStream::connect(&bench.address.path).unwrap();
    assert_eq!(
        further.read(&mut [0]).unwrap(),
        0,
        "one more is turned away"
    );
    assert!(clients[0].ask("{}").get("error").is_some());
}
