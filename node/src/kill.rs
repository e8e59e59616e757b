//! Named places where the crash tests let the agent die (feature `kill-points`); in a release they are nothing.
//!
//! Each deed of [`crate::run`] is a [`Step`] with a point before and a point after it. Between, whatever does it (down to the
//! system calls) has points by [`inside`], [`wrote`] and [`called`]. With the feature, every point that is passed is told
//! once on standard error, so that a test learns them all from one life of a volume; at the one that
//! `PROXMOX_CSI_KILL_AT` names, `inside:stage:Mount:fsmount` for one, the process aborts; at the one of `PROXMOX_CSI_HOLD_AT` the first
//! comer stays, for `PROXMOX_CSI_LIMIT_HOLD` milliseconds, until there is the file `PROXMOX_CSI_HOLD_UNTIL`, or for ever. `PROXMOX_CSI_LIMIT_CALL` (milliseconds) is the time after which a call is answered though it
//! has not ended, `PROXMOX_CSI_LIMIT_TRIM` that from one trim to the next, `_TRIM_PIECE` that for a piece of one, `_STUCK` that after which a disk is
//! called one that does not answer, `_FLUSH` what a flush may take longer than that.

#[cfg(not(feature = "kill-points"))]
mod points {
    use std::fmt::Debug;
    use std::marker::PhantomData;

    /// A deed under way.
    #[derive(Debug)]
    pub struct Step(PhantomData<*const ()>);

    /// Begins a deed of an RPC.
    #[inline(always)]
    pub fn step(_: &'static str, _: &impl Debug) -> Step {
        Step(PhantomData)
    }

    impl Step {
        /// Ends it: it has succeeded.
        #[inline(always)]
        pub fn done(self) {}
    }

    /// A place in the middle of a deed.
    #[inline(always)]
    pub fn inside(_: &str) {}

    /// A write or flush of a format has been done.
    #[inline(always)]
    pub fn wrote(_is_flush: bool) {}

    /// The call that does it all comes next: the end comes during or after it.
    #[inline(always)]
    pub fn called(_: &str) {}

    /// A time that the tests may shorten.
    #[inline(always)]
    #[must_use]
    pub fn limit(_: &str, limit: std::time::Duration) -> std::time::Duration {
        limit
    }
}

#[cfg(feature = "kill-points")]
mod points {
    use std::cell::RefCell;
    use std::collections::BTreeSet;
    use std::fmt::Debug;
    use std::marker::PhantomData;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Mutex, PoisonError};
    use std::time::{Duration, Instant};

    /// From the call to the end: some calls are over by then, the long ones are not. No test depends on which.
    const IN_CALL: Duration = Duration::from_millis(1);
    /// Whether the hold is over.
    const LOOK_EVERY: Duration = Duration::from_millis(20);

    #[derive(Default)]
    struct Current {
        /// `stage:Mount`
        name: String,
        writes: u32,
        flushes: u32,
        /// The end has been ordered; it may be a moment off.
        is_doomed: bool,
    }

    thread_local! {
        static CURRENT: RefCell<Current> = RefCell::default();
    }

    static TOLD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

    /// A deed under way, on the thread that does it.
    #[derive(Debug)]
    pub struct Step(PhantomData<*const ()>);

    /// Begins a deed of an RPC. Its name is the first word of its `Debug`.
    pub fn step(doing: &'static str, step: &impl Debug) -> Step {
        let text = format!("{step:?}");
        let word = text.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
        let name = format!("{doing}:{word}");
        pass(&format!("before:{name}"));
        CURRENT.set(Current { name, ..Current::default() });
        Step(PhantomData)
    }

    impl Step {
        /// Ends it: it has succeeded.
        pub fn done(self) {
            let current = CURRENT.take();
            if current.is_doomed {
                wait_for_the_end();
            }
            pass(&format!("after:{}", current.name));
        }
    }

    impl Drop for Step {
        fn drop(&mut self) {
            if CURRENT.take().is_doomed {
                wait_for_the_end();
            }
        }
    }

    /// A place in the middle of a deed. Outside of one it is nothing.
    pub fn inside(place: &str) {
        if let Some(point) = point(place) {
            pass(&point);
        }
    }

    /// A write or flush of a format has been done: points after 1, 2, 4, … writes, and after every flush.
    pub fn wrote(is_flush: bool) {
        let place = CURRENT.with_borrow_mut(|current| {
            let count = if is_flush { &mut current.flushes } else { &mut current.writes };
            *count += 1;
            match (is_flush, *count) {
                (true, count) => Some(format!("flush-{count}")),
                (false, count) if count.is_power_of_two() => Some(format!("write-{count}")),
                (false, _) => None,
            }
        });
        place.iter().for_each(|place| inside(place));
    }

    /// The call that does it all comes next: the end comes during or after it, and surely before the deed is done.
    pub fn called(place: &str) {
        let Some(point) = point(place) else { return };
        tell(&point);
        hold(&point);
        if is_wanted(&point) {
            CURRENT.with_borrow_mut(|current| current.is_doomed = true);
            std::thread::spawn(move || {
                std::thread::park_timeout(IN_CALL);
                end(&point);
            });
        }
    }

    /// `PROXMOX_CSI_LIMIT_<what>` in milliseconds, or the real one.
    #[must_use]
    pub fn limit(what: &str, limit: Duration) -> Duration {
        let given = std::env::var(format!("PROXMOX_CSI_LIMIT_{what}")).ok().and_then(|given| given.parse().ok());
        given.map_or(limit, Duration::from_millis)
    }

    /// The first that comes to the point of `PROXMOX_CSI_HOLD_AT` stays there.
    fn hold(point: &str) {
        static IS_HELD: AtomicBool = AtomicBool::new(false);
        if std::env::var("PROXMOX_CSI_HOLD_AT").is_ok_and(|at| at == point) && !IS_HELD.swap(true, Ordering::Relaxed) {
            eprintln!("held at {point}");
            let (begun, limit) = (Instant::now(), limit("HOLD", Duration::MAX));
            let until = std::env::var_os("PROXMOX_CSI_HOLD_UNTIL");
            let is_over = || until.as_ref().is_some_and(|until| std::path::Path::new(until).exists());
            while let Some(left) = limit.checked_sub(begun.elapsed()).filter(|left| !left.is_zero() && !is_over()) {
                std::thread::park_timeout(if until.is_some() { left.min(LOOK_EVERY) } else { left });
            }
        }
    }

    fn point(place: &str) -> Option<String> {
        CURRENT.with_borrow(|current| (!current.name.is_empty()).then(|| format!("inside:{}:{place}", current.name)))
    }

    fn pass(point: &str) {
        tell(point);
        hold(point);
        if is_wanted(point) {
            end(point);
        }
    }

    fn is_wanted(point: &str) -> bool {
        std::env::var("PROXMOX_CSI_KILL_AT").is_ok_and(|at| at == point)
    }

    fn tell(point: &str) {
        if TOLD.lock().unwrap_or_else(PoisonError::into_inner).insert(point.to_owned()) {
            eprintln!("kill point {point}");
        }
    }

    fn end(point: &str) -> ! {
        eprintln!("killed at {point}");
        std::process::abort();
    }

    fn wait_for_the_end() {
        loop {
            std::thread::park();
        }
    }
}

pub use points::{Step, called, inside, limit, step, wrote};
