//! The ioctls that only x86-64 has.
