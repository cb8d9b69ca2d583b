//! What a timer of KVM's showed when the VM stopped.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A value that the handler of a timer reads on a stop and sets on the next start, so that the
/// timer stands still in between. The timer's device state shares it: it sends what the handler
/// has read, and leaves what it received for the handler to set.
#[derive(Debug)]
pub(super) struct AtStop<T>(Arc<Mutex<Option<T>>>);

impl<T: Copy> AtStop<T> {
    /// The value of the last stop; `None` before the first, while the timer is KVM's own.
    pub(super) fn get(&self) -> Option<T> {
        *self.lock()
    }

    /// Keeps `value` for the next start.
    pub(super) fn set(&self, value: T) {
        *self.lock() = Some(value);
    }

    fn lock(&self) -> MutexGuard<'_, Option<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Clone for AtStop<T> {
    fn clone(&self) -> Self {
        AtStop(Arc::clone(&self.0))
    }
}

impl<T> Default for AtStop<T> {
    fn default() -> Self {
        AtStop(Arc::default())
    }
}
