//! "sparse-sha256-v1", the digest of the golden manifests.

use sha2::{Digest, Sha256};

use crate::image::{Image, UNIT};

/// Over every maximal run of written units: offset, length, bytes.
pub(crate) fn digest(image: &Image) -> String {
    let mut digest = Sha256::new();
    let mut units = image.written().peekable();
    while let Some((first, bytes)) = units.next() {
        let mut run = vec![bytes];
        while let Some((_, bytes)) = units.next_if(|(key, _)| *key == first + run.len() as u64) {
            run.push(bytes);
        }
        let length: usize = run.iter().map(|bytes| bytes.len()).sum();
        digest.update((first * UNIT as u64).to_le_bytes());
        digest.update((length as u64).to_le_bytes());
        run.iter().for_each(|bytes| digest.update(bytes));
    }
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
