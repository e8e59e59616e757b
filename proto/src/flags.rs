//! Flags: written in the next commit.
