//! What devices have in common: how the bus reaches them, and how their state migrates.

pub mod bus;
pub mod line;
pub mod pci;
pub mod pl011;
pub mod pl031;
pub mod pl061;
pub mod serial;
pub mod virtio;

use std::ffi::CStr;

use serde::{Deserialize, Serialize, Serializer};

use crate::kvm;
use crate::probes::Errno;

/// Something the guest reaches by loads and stores or by port I/O.
///
/// The guest is hostile: any offset inside the device's range and any width must be answered.
pub trait BusDevice: Send {
    /// A load of `data.len()` bytes; what is not written reads as 0.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// A store of `data.len()` bytes.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Something whose state goes with the guest. `machine.rs` lists them in the order in which they
/// are saved and loaded.
pub trait DeviceState: Send {
    /// Its name in the stream, in probes and in reports.
    fn name(&self) -> &CStr;
    /// The version of what [`DeviceState::save`] writes.
    fn version(&self) -> u32;
    /// The state, encoded. No vCPU runs.
    fn save(&mut self) -> Result<Vec<u8>, StateError>;
    /// Puts a saved state into this device. `state` comes from a peer or a file and may be
    /// anything.
    fn load(&mut self, version: u32, state: &[u8]) -> Result<(), StateError>;
}

/// A device's state could not be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// Saved by a version that this one does not know.
    #[error("state version {found}, this monitor reads {expected}")]
    Version {
        /// The state's version.
        found: u32,
        /// The version that this monitor writes.
        expected: u32,
    },
    /// The bytes are no such state.
    #[error("state of {len} bytes can't be decoded")]
    Decode {
        /// Its length.
        len: usize,
        /// What postcard said.
        source: postcard::Error,
    },
    /// Well formed, but not a state that this device can be in.
    #[error("{0}")]
    Invalid(String),
}

impl Errno for StateError {
    fn errno(&self) -> i32 {
        match self {
            StateError::Kvm(source) => source.errno(),
            StateError::Version { .. } => libc::ENOTSUP,
            StateError::Decode { .. } => libc::EBADMSG,
            StateError::Invalid(_) => libc::EINVAL,
        }
    }
}

/// Encodes a device's state, for [`DeviceState::save`].
pub fn encode<T: Serialize>(state: &T) -> Result<Vec<u8>, StateError> {
    encode_with_room(state, 0)
}

/// The same for a large state, whose buffer would move several times as it grows: makes room for
/// `room` bytes at once.
pub fn encode_with_room<T: Serialize>(state: &T, room: usize) -> Result<Vec<u8>, StateError> {
    postcard::to_extend(state, Vec::with_capacity(room))
        .map_err(|source| StateError::Decode { len: 0, source })
}

/// For `#[serde(serialize_with)]` of a byte slice in a state: copies it at once. By itself serde takes
/// each byte for an element, which a stop has no time for.
pub fn bytes<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(bytes)
}

/// Decodes a device's state of version `expected`, for [`DeviceState::load`]. What is left over
/// after the state is an error too.
pub fn decode<'a, T: Deserialize<'a>>(
    expected: u32,
    found: u32,
    state: &'a [u8],
) -> Result<T, StateError> {
    if found != expected {
        return Err(StateError::Version { found, expected });
    }
    match postcard::take_from_bytes(state) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(StateError::Invalid(format!(
            "{} bytes follow the state",
            rest.len()
        ))),
        Err(source) => Err(StateError::Decode {
            len: state.len(),
            source,
        }),
    }
}
