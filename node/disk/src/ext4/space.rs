//! Which blocks are taken, as runs: a bitmap of 64 TiB would be 2 GiB, its runs are a few per 16 groups.

use super::geometry::Geometry;

/// Taken blocks: disjoint runs `[start, end)` in ascending order, neighbours merged.
#[derive(Debug, Clone, Default)]
pub(super) struct Taken {
    runs: Vec<(u64, u64)>,
}

impl Taken {
    /// Takes `[start, start + length)`, which is free.
    pub(super) fn take(&mut self, start: u64, length: u64) {
        let end = start + length;
        if length == 0 {
            return;
        }
        let at = self.runs.partition_point(|run| run.1 < start);
        match self.runs.get_mut(at) {
            Some(run) if run.1 == start => {
                run.1 = end;
                let grown = *run;
                if let Some(next) = self.runs.get(at + 1).filter(|next| next.0 == grown.1).copied() {
                    self.runs.remove(at + 1);
                    if let Some(run) = self.runs.get_mut(at) {
                        run.1 = next.1;
                    }
                }
            }
            Some(run) if run.0 == end => run.0 = start,
            _ => self.runs.insert(at, (start, end)),
        }
    }

    /// The runs that reach into `[start, end)`, cut to it.
    pub(super) fn within(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let from = self.runs.partition_point(|run| run.1 <= start);
        let runs = self.runs.get(from..).unwrap_or_default();
        runs.iter().take_while(move |run| run.0 < end).map(move |run| (run.0.max(start), run.1.min(end)))
    }

    /// Taken blocks in `[start, end)`.
    pub(super) fn count(&self, start: u64, end: u64) -> u64 {
        self.within(start, end).map(|run| run.1 - run.0).sum()
    }

    /// The first taken run that ends after `block`.
    fn next(&self, block: u64) -> Option<(u64, u64)> {
        self.runs.get(self.runs.partition_point(|run| run.1 <= block)).copied()
    }

    /// The longest run of free blocks that begins at the first free block at or after `from`, of at most `most` blocks,
    /// below `end`.
    pub(super) fn free_run(&self, from: u64, most: u64, end: u64) -> Option<(u64, u64)> {
        let mut start = from;
        loop {
            if start >= end {
                return None;
            }
            match self.next(start) {
                Some((taken, after)) if taken <= start => start = after,
                Some((taken, _)) => return Some((start, most.min(taken.min(end) - start))),
                None => return Some((start, most.min(end - start))),
            }
        }
    }

    /// mke2fs's search for `length` free blocks in a row: from `start` upwards, beginning again at the front when the
    /// end is reached and `finish` is not above `start`; a search that reaches `finish` has failed, even if there is
    /// room further on. The layout of a filesystem depends on this.
    pub(super) fn search(&self, geometry: &Geometry, start: u64, finish: u64, length: u64) -> Option<u64> {
        let front = geometry.first_data_block;
        let start = if start == 0 { front } else { start };
        let finish = if finish == 0 { start } else { finish };
        // One past the last block at which `length` blocks fit.
        let limit = geometry.blocks.checked_sub(length)? + 1;
        let mut at = start;
        let mut went_round = false;
        loop {
            if at >= limit {
                if finish > start || went_round {
                    return None;
                }
                (at, went_round) = (front, true);
            }
            let Some((taken, after)) = self.next(at) else { return Some(at) };
            if taken >= at + length {
                return Some(at);
            }
            // Every block up to `after` fails as a start; the search passes them one by one, and looks for `finish`.
            let next = after.min(limit);
            if at < finish && finish <= next {
                return None;
            }
            at = next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_merge_and_counts_are_cut_to_the_range() {
        let mut taken = Taken::default();
        taken.take(10, 5);
        taken.take(20, 5);
        taken.take(15, 5);
        assert_eq!(taken.runs, [(10, 25)]);
        taken.take(30, 1);
        taken.take(29, 1);
        taken.take(31, 1);
        assert_eq!(taken.runs, [(10, 25), (29, 32)]);
        assert_eq!(taken.count(12, 30), 14);
        assert_eq!(taken.free_run(10, 100, 1000), Some((25, 4)));
        assert_eq!(taken.free_run(29, 100, 1000), Some((32, 100)));
        assert_eq!(taken.free_run(29, 100, 32), None);
    }
}
