//! What is on its way over one connection: frames of pages that were sent and not acknowledged yet.

use super::channel::Channel;
use super::stream::Error;
use super::stream::message::Ack;
use super::stream::ram::Tally;

/// Frames of pages that may be on their way at once: 16 MiB. Each is answered, so this bounds what
/// the answers take up as well, and neither side can block the other for ever.
const WINDOW: u64 = 64;

/// The count of one connection.
#[derive(Debug, Default)]
pub(super) struct Flow {
    frames_sent: u64,
    frames_loaded: u64,
    /// Payload bytes of `ram` frames.
    bytes_sent: u64,
    bytes_loaded: u64,
}

impl Flow {
    /// Waits until one more frame may be sent.
    ///
    /// # Errors
    /// When the destination says anything but that it has loaded pages.
    pub(super) fn make_room(&mut self, channel: &mut Channel) -> Result<(), Error> {
        while self.frames_sent - self.frames_loaded >= WINDOW {
            channel.advance()?;
            self.acknowledge(channel)?;
        }
        Ok(())
    }

    /// Waits until everything is loaded.
    ///
    /// # Errors
    /// As [`Flow::make_room`].
    pub(super) fn drain(&mut self, channel: &mut Channel) -> Result<(), Error> {
        while !self.is_drained() {
            channel.advance()?;
            self.acknowledge(channel)?;
        }
        Ok(())
    }

    /// Counts a frame that was sent.
    pub(super) fn sent(&mut self, tally: Tally) {
        self.frames_sent += 1;
        self.bytes_sent += tally.bytes;
    }

    /// Counts all that was sent as loaded: nobody answers, or an answer means just that.
    pub(super) fn all_loaded(&mut self) {
        self.frames_loaded = self.frames_sent;
        self.bytes_loaded = self.bytes_sent;
    }

    /// Whether everything that was sent is loaded.
    pub(super) fn is_drained(&self) -> bool {
        self.frames_loaded == self.frames_sent
    }

    /// Payload bytes that are loaded.
    pub(super) fn bytes_loaded(&self) -> u64 {
        self.bytes_loaded
    }

    /// Counts the acknowledgement that was received last.
    ///
    /// # Errors
    /// When it is none, or one of what was never sent.
    pub(super) fn acknowledge(&mut self, channel: &Channel) -> Result<(), Error> {
        let frame = channel.current();
        let Ack { bytes } = frame.decode("an acknowledgement of pages")?;
        let possible = !self.is_drained() && (self.bytes_loaded..=self.bytes_sent).contains(&bytes);
        if !possible {
            return Err(frame.malformed("it acknowledges what was never sent".to_owned()));
        }
        self.frames_loaded += 1;
        self.bytes_loaded = bytes;
        Ok(())
    }
}
