//! What state the VM is in, and who is told when that changes.

pub mod event;
pub mod notify;
pub mod states;

pub use event::{Event, EventSender, EventSink, GuestRequests, Request};
pub use notify::{CallbackError, HandlerError, NotifyList, StateHandler};
pub use states::{IllegalTransition, RunState};
