//! The mark of an unfinished format: judged, and put around any plan. The first byte: 1 mends the checksum, 2 makes a plan of the rest.
#![no_main]

use disk::Write;
use disk::mark::{Format, Mark, Marked, SECTOR_BYTES};
use fuzz::disk_model::Disk;
use libfuzzer_sys::fuzz_target;

const SIZE_BYTES: u64 = 64 << 10;

fuzz_target!(init: fuzz::limit_memory(), |data: &[u8]| {
    let Some((how, data)) = data.split_first() else { return };
    if *how == 2 {
        return planned(data);
    }
    let mark = Mark::new("csi-0123456789abcdef").expect("a serial");
    let mut sector = data.to_vec();
    if *how == 1 {
        sector.resize(SECTOR_BYTES, 0);
        let sum = crc32c::crc32c(&sector[..508]);
        sector[508..].copy_from_slice(&sum.to_le_bytes());
    }
    let judged = mark.judge(&sector);
    assert_eq!(judged == Marked::Ours, sector.starts_with(mark.sector()), "ours");
    if sector.iter().any(|byte| *byte != 0) && sector.starts_with(b"PVE-CSI unfinished format\n") {
        assert_ne!(judged, Marked::No);
    }
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(other) = Mark::new(text)
    {
        assert_eq!(other.judge(other.sector()), Marked::Ours);
        assert_eq!(mark.judge(other.sector()) == Marked::Ours, other == mark);
        assert_eq!(format!("{other:?}"), format!("Mark({text})"));
    }
});

/// The same bytes in the end as without the mark; and until the last write the disk carries it.
fn planned(data: &[u8]) {
    let plan: Vec<Write> = data
        .chunks_exact(3)
        .map(|step| {
            let offset = u64::from(step[0] % 64) * 512;
            let length = u64::from(step[1] % 8 + 1) * 512;
            match step[2] {
                0..64 => Write::Flush,
                64..96 => Write::Zeros { offset, length },
                fill => Write::Data { offset, bytes: vec![fill; usize::try_from(length).expect("small")] },
            }
        })
        .collect();
    let mark = Mark::new("csi-0123456789abcdef").expect("a serial");
    let mut plain = Disk::new(Vec::new(), SIZE_BYTES);
    plain.write(plan.clone());
    let mut marked = Disk::new(Vec::new(), SIZE_BYTES);
    let writes: Vec<Write> = Format::new(plan.into_iter(), &mark).collect();
    let Some((before, last)) = writes.split_last_chunk::<3>() else { panic!("{} writes", writes.len()) };
    assert_eq!((&last[0], &last[2]), (&Write::Flush, &Write::Flush));
    for (number, write) in before.iter().enumerate() {
        marked.write([write.clone()]);
        assert_eq!(mark.judge(&marked.at(0, SECTOR_BYTES)), Marked::Ours, "after write {number}");
    }
    marked.write(last.clone());
    let size = usize::try_from(SIZE_BYTES).expect("small");
    assert!(marked.at(0, size) == plain.at(0, size), "the mark changed what is written");
}
