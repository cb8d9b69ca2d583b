//! [2] Live migration.

mod clock;
mod converge;
mod stream;
pub mod uri;
