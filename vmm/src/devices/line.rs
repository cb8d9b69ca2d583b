//! A level-triggered interrupt line from a device to the interrupt controller.

use std::fmt;
use std::io;

/// Says the interrupt controller which level the line has from now on.
type Drive = Box<dyn Fn(bool) -> io::Result<()> + Send>;

/// An interrupt line. The board connects it; a device sets it whenever its registers change.
pub struct Line {
    level: bool,
    drive: Drive,
}

impl Line {
    /// A line that is low. `drive` tells the interrupt controller of each change, `KVM_IRQ_LINE` in
    /// a VM.
    pub fn new(drive: impl Fn(bool) -> io::Result<()> + Send + 'static) -> Self {
        Line {
            level: false,
            drive: Box::new(drive),
        }
    }

    /// Makes the line high or low; nothing happens when it is so already.
    pub fn set(&mut self, level: bool) {
        if level != self.level {
            self.drive(level);
        }
    }

    /// Says again which level the line has: after a load, when the interrupt controller's state
    /// came from another machine.
    pub fn drive(&mut self, level: bool) {
        match (self.drive)(level) {
            Ok(()) => self.level = level,
            Err(error) => tracing::error!(%error, "an interrupt line can't be driven"),
        }
    }
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Line").field("level", &self.level).finish()
    }
}
