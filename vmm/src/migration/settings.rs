//! What a client sets of migrations: QEMU's parameters and capabilities, those that mean something
//! here. Parameters may change while a migration runs, which follows them from round to round.

use std::ffi::CStr;
use std::ops::RangeInclusive;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::credentials::Keyring;

/// Rows of `Variant = "name", default, range, "what its values are", "QEMU's type", "doc";`.
macro_rules! parameters {
    ($($variant:ident = $name:literal, $default:expr, $range:expr, $says:literal, $type:literal, $doc:literal;)*) => {
        /// A parameter of migrations: QEMU's `MigrationParameter`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Parameter { $(#[doc = $doc] $variant,)* }

        impl Parameter {
            /// All there are.
            pub const ALL: &[Parameter] = &[$(Parameter::$variant,)*];
            const DEFAULTS: [u64; Self::ALL.len()] = [$($default,)*];

            /// QEMU's name of it.
            pub fn name(self) -> &'static str {
                match self { $(Parameter::$variant => $name,)* }
            }

            /// The values, and how QEMU's error says what they are.
            fn range(self) -> (RangeInclusive<u64>, &'static str) {
                match self { $(Parameter::$variant => ($range, $says),)* }
            }

            /// QEMU's type of it, as its errors name it.
            pub fn type_name(self) -> &'static str {
                match self { $(Parameter::$variant => $type,)* }
            }
        }
    };
}

parameters! {
    DowntimeLimit = "downtime-limit", 300, 0..=2_000_000, "an integer in the range of 0 to (2000 * 1000) ms", "uint64",
        "The guest is stopped when what is left takes no longer than this, ms.";
    MaxBandwidth = "max-bandwidth", 0, 0..=u64::MAX, "an integer", "uint64",
        "RAM is sent no faster than this while the guest runs, bytes a second; 0 is as fast as it goes, \
         which is the default here and not QEMU's.";
    MultifdChannels = "multifd-channels", 2, 1..=255, "a value between 1 and 255", "uint8_t",
        "How many connections pages go over with the capability `multifd`.";
    ThrottleTriggerThreshold = "throttle-trigger-threshold", 50, 1..=100, "an integer in the range of 1 to 100", "uint8_t",
        "With `auto-converge`, the guest is slowed down when it dirties more than this share of what is sent, %.";
    CpuThrottleInitial = "cpu-throttle-initial", 20, 1..=99, "an integer in the range of 1 to 99", "uint8_t",
        "How much of its time it rests at first, %.";
    CpuThrottleIncrement = "cpu-throttle-increment", 10, 1..=99, "an integer in the range of 1 to 99", "uint8_t",
        "How much more each time that is not enough, %.";
    MaxCpuThrottle = "max-cpu-throttle", 99, 1..=99, "an integer in the range of cpu_throttle_initial to 99", "uint8_t",
        "How much at most, %.";
    MigrationTimeout = "migration-timeout", 0, 0..=31_536_000, "an integer in the range of 0 to 31536000 s", "uint32",
        "When `timeout-action` is taken if the guest still is not stopped, s; 0 is never. QEMU has no such thing.";
}

/// A parameter of migrations that is a text, and empty by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Text {
    /// The id of the credentials that a migration is encrypted with.
    TlsCreds,
    /// The name that the destination's certificate is to be for, if not that of the URI.
    TlsHostname,
    /// The id of what decides which sources are let in; there is none here.
    TlsAuthz,
}

impl Text {
    /// All there are.
    pub const ALL: [Text; 3] = [Text::TlsCreds, Text::TlsHostname, Text::TlsAuthz];

    /// QEMU's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Text::TlsCreds => "tls-creds",
            Text::TlsHostname => "tls-hostname",
            Text::TlsAuthz => "tls-authz",
        }
    }
}

/// How a guest moves: QEMU's `MigMode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Its RAM is sent.
    #[default]
    Normal,
    /// Its RAM is passed to another process of this host, by a descriptor.
    CprTransfer,
}

impl Mode {
    /// All there are.
    pub const ALL: [Mode; 2] = [Mode::Normal, Mode::CprTransfer];

    /// QEMU's name of it.
    pub fn name(self) -> &'static str {
        self.c_name().to_str().unwrap_or_default()
    }

    /// The same for a probe.
    pub fn c_name(self) -> &'static CStr {
        match self {
            Mode::Normal => c"normal",
            Mode::CprTransfer => c"cpr-transfer",
        }
    }
}

/// What is done when a migration takes longer than `migration-timeout`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TimeoutAction {
    /// It fails; the guest runs on.
    #[default]
    Cancel,
    /// The guest is stopped after the round that is under way, whatever the downtime will be.
    Force,
}

impl TimeoutAction {
    /// All there are.
    pub const ALL: [TimeoutAction; 2] = [TimeoutAction::Cancel, TimeoutAction::Force];

    /// Its name in QMP.
    pub fn name(self) -> &'static str {
        match self {
            TimeoutAction::Cancel => "cancel",
            TimeoutAction::Force => "force",
        }
    }
}

macro_rules! capabilities {
    ($($variant:ident = $name:literal, $doc:literal;)*) => {
        /// What migrations can do if they are told to: QEMU's `MigrationCapability`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Capability { $(#[doc = $doc] $variant,)* }

        impl Capability {
            /// All there are.
            pub const ALL: &[Capability] = &[$(Capability::$variant,)*];

            /// QEMU's name of it.
            pub fn name(self) -> &'static str {
                match self { $(Capability::$variant => $name,)* }
            }

            /// The one that QEMU calls `name`.
            pub fn from_name(name: &str) -> Option<Capability> {
                Self::ALL.iter().copied().find(|capability| capability.name() == name)
            }
        }
    };
}

capabilities! {
    Multifd = "multifd", "Pages go over `multifd-channels` connections.";
    MappedRam = "mapped-ram", "Each page has a place of its own in the file that the guest is saved to.";
    AutoConverge = "auto-converge", "A guest that dirties RAM faster than it is sent is slowed down.";
    Events = "events", "Each change of a migration's status is a `MIGRATION` event.";
    PauseBeforeSwitchover = "pause-before-switchover",
        "The source stops the guest, then waits for `migrate-continue` before it sends the rest.";
}

/// A value that a parameter can't have; QEMU's words, and its underscores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Parameter '{}' expects {}", .0.name().replace('-', "_"), .0.range().1)]
pub struct OutOfRange(Parameter);

/// The settings of one machine.
#[derive(Debug, Default)]
pub struct Settings {
    values: Mutex<Values>,
    keyring: Keyring,
}

#[derive(Clone, Debug)]
struct Values {
    texts: [String; Text::ALL.len()],
    parameters: [u64; Parameter::ALL.len()],
    capabilities: [bool; Capability::ALL.len()],
    mode: Mode,
    timeout_action: TimeoutAction,
}

impl Default for Values {
    fn default() -> Self {
        Values {
            texts: Default::default(),
            parameters: Parameter::DEFAULTS,
            capabilities: [false; Capability::ALL.len()],
            mode: Mode::default(),
            timeout_action: TimeoutAction::default(),
        }
    }
}

impl Settings {
    /// A parameter's value.
    pub fn parameter(&self, parameter: Parameter) -> u64 {
        self.lock().parameters[parameter as usize]
    }

    /// Sets all of `changes`, or none.
    ///
    /// # Errors
    /// At the first value that its parameter can't have.
    pub fn set_parameters(&self, changes: &[(Parameter, u64)]) -> Result<(), OutOfRange> {
        let wrong = changes
            .iter()
            .find(|(p, value)| !p.range().0.contains(value));
        if let Some(&(parameter, _)) = wrong {
            return Err(OutOfRange(parameter));
        }
        let mut values = self.lock();
        let mut new = values.parameters;
        for &(parameter, value) in changes {
            new[parameter as usize] = value;
        }
        let most = Parameter::MaxCpuThrottle;
        if new[most as usize] < new[Parameter::CpuThrottleInitial as usize] {
            return Err(OutOfRange(most));
        }
        values.parameters = new;
        Ok(())
    }

    /// A text's value.
    pub fn text(&self, text: Text) -> String {
        self.lock().texts[text as usize].clone()
    }

    /// Sets it, for the next migration.
    pub fn set_text(&self, text: Text, value: String) {
        self.lock().texts[text as usize] = value;
    }

    /// The credentials that there are.
    pub fn keyring(&self) -> &Keyring {
        &self.keyring
    }

    /// How the next migration from here is done.
    pub fn mode(&self) -> Mode {
        self.lock().mode
    }

    /// Decides that; one that is under way goes on as it began.
    pub fn set_mode(&self, mode: Mode) {
        self.lock().mode = mode;
    }

    /// What is done about a migration that takes too long.
    pub fn timeout_action(&self) -> TimeoutAction {
        self.lock().timeout_action
    }

    /// Decides that, also for one that is under way.
    pub fn set_timeout_action(&self, action: TimeoutAction) {
        self.lock().timeout_action = action;
    }

    /// Whether a capability is on.
    pub fn is_on(&self, capability: Capability) -> bool {
        self.lock().capabilities[capability as usize]
    }

    /// Switches capabilities. [`Migrations`](super::Migrations) sees to it that no migration is
    /// under way.
    pub fn set_capabilities(&self, changes: &[(Capability, bool)]) {
        let mut values = self.lock();
        for &(capability, on) in changes {
            values.capabilities[capability as usize] = on;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Values> {
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_changes_are_made_or_none() {
        let settings = Settings::default();
        let set = |limit| {
            let changes = [
                (Parameter::MaxBandwidth, 5),
                (Parameter::DowntimeLimit, limit),
            ];
            settings.set_parameters(&changes)
        };
        let error = set(2_000_001).unwrap_err().to_string();
        assert_eq!(
            error,
            "Parameter 'downtime_limit' expects an integer in the range of 0 to (2000 * 1000) ms"
        );
        assert_eq!(settings.parameter(Parameter::MaxBandwidth), 0);
        set(2_000_000).unwrap();
        assert_eq!(settings.parameter(Parameter::MaxBandwidth), 5);
        assert_eq!(settings.parameter(Parameter::DowntimeLimit), 2_000_000);
    }

    #[test]
    fn capabilities_are_off_until_they_are_switched_on() {
        let settings = Settings::default();
        let on = |settings: &Settings| {
            let all = Capability::ALL.iter();
            all.filter(|c| settings.is_on(**c)).count()
        };
        assert_eq!(on(&settings), 0);
        settings.set_capabilities(&[(Capability::Events, true)]);
        assert!(settings.is_on(Capability::Events));
        assert_eq!(on(&settings), 1);
        assert_eq!(Capability::from_name("events"), Some(Capability::Events));
        assert_eq!(Capability::from_name("Events"), None);
    }
}
