//! A check as CI systems and monitoring read it, one file a format. JSON, schema
//! `blackout.check/1`, is the [`super::Check`] itself.

pub mod bencher;
pub mod github;
pub mod junit;
pub mod openmetrics;
