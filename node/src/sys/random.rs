//! Randomness for keys and salts: the kernel's, and none else.

use std::path::Path;

use rustix::rand::{GetRandomFlags, getrandom};

use super::Error;

/// Fills the buffer; waits until the kernel has gathered enough, once after boot.
///
/// # Errors
/// As the kernel says; nothing of the buffer is to be used then.
pub fn fill(buffer: &mut [u8]) -> Result<(), Error> {
    let failed = Error::at("getrandom", Path::new("the kernel's random numbers"));
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        // Long requests are cut where a signal comes, and beyond 32 MiB.
        filled += getrandom(rest, GetRandomFlags::empty()).map_err(&failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_a_long_buffer_is_filled() {
        let mut buffer = vec![0; 1 << 20];
        fill(&mut buffer).unwrap();
        assert!(buffer.chunks(32).all(|chunk| chunk.iter().any(|byte| *byte != 0)), "32 zeros in a row are no chance");
    }
}
