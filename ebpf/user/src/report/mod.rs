//! What a person or a program reads of migrations: [`text`] for a terminal, [`schema`] as JSON.

pub(crate) mod bars;
pub mod schema;
pub mod text;
mod tree;
pub(crate) mod units;
