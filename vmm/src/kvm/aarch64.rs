//! The ioctls that only arm64 has.
