//! The console, of which only the transmit register is used: the first of a 16550, and of a PL011.

use core::fmt;

use crate::arch;

/// The serial port; a port at 0 takes the text and drops it.
pub(crate) struct Serial {
    base: u64,
}

impl Serial {
    /// The port at `base`, as the boot page gives it.
    pub(crate) fn new(base: u64) -> Self {
        Serial { base }
    }
}

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if self.base != 0 {
            text.bytes().for_each(|byte| arch::put(self.base, byte));
        }
        Ok(())
    }
}
