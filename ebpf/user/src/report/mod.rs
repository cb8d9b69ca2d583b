//! What a person or a program reads of migrations: [`text`] for a terminal, [`schema`] as JSON.

pub mod schema;
pub mod text;
mod tree;
mod units;
