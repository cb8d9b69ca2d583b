//! Bare-metal guests.
#![no_std]
#![no_main]
