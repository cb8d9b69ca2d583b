//! The command line: `key=number` words, numbers in decimal; K, M and G multiply.

use blackout_abi::guest::BootPage;

use crate::Failure;

/// What the guest does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Config {
    /// `its_devices`: devices to map in the ITS (arm64). 0 leaves the ITS alone.
    pub(crate) its_devices: u32,
    /// `its_events`: events of each device.
    pub(crate) its_events: u32,
    /// `its_indirect`: 1 asks for a two-level device table.
    pub(crate) its_indirect: bool,
    /// `dirty`: bytes to keep dirty, whole pages.
    pub(crate) dirty: u64,
    /// `idle`: 1 halts vCPU 0 once it is ready; it does no work and answers no command.
    pub(crate) idle: bool,
    /// `exits`: 1 makes vCPU 0 leave guest code all the time, once for each of its counts, and do
    /// nothing else.
    pub(crate) exits: bool,
    /// `cpus`: vCPUs to use; all of the machine's unless given.
    pub(crate) vcpus: usize,
}

impl Config {
    /// Reads the boot page's command line.
    pub(crate) fn parse(boot: &BootPage) -> Result<Self, Failure> {
        let mut config = Config {
            its_devices: 0,
            its_events: 1,
            its_indirect: false,
            dirty: 0,
            idle: false,
            exits: false,
            vcpus: boot.vcpus as usize,
        };
        let text = boot
            .cmdline
            .get(..boot.cmdline_len as usize)
            .and_then(|bytes| core::str::from_utf8(bytes).ok())
            .ok_or(Failure::CommandLine)?;
        for word in text.split_ascii_whitespace() {
            config.set(word).ok_or(Failure::CommandLine)?;
        }
        if config.vcpus == 0 || config.vcpus > boot.vcpus as usize || config.its_events == 0 {
            return Err(Failure::CommandLine);
        }
        Ok(config)
    }

    fn set(&mut self, word: &str) -> Option<()> {
        let (key, value) = word.split_once('=')?;
        let number = parse(value)?;
        match key {
            "its_devices" => self.its_devices = number.try_into().ok()?,
            "its_events" => self.its_events = number.try_into().ok()?,
            "its_indirect" => self.its_indirect = number != 0,
            "dirty" => self.dirty = number.checked_next_multiple_of(4096)?,
            "idle" => self.idle = number != 0,
            "exits" => self.exits = number != 0,
            "cpus" => self.vcpus = number.try_into().ok()?,
            _ => return None,
        }
        Some(())
    }
}

fn parse(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' => (text.get(..text.len() - 1)?, 10),
        b'M' => (text.get(..text.len() - 1)?, 20),
        b'G' => (text.get(..text.len() - 1)?, 30),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}
