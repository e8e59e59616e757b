//! Identity service.
