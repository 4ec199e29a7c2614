//! Sharing a kernel's work among the threads of the caller's rayon pool (feature `threads`; one thread without it). Every value
//! is computed as on one thread, whoever computes it: the number of threads changes no bit.

/// Multiply-adds that are worth another thread: about 10 microseconds.
#[cfg(feature = "threads")]
const GRAIN: usize = 1 << 17;

/// Most parts of a kernel that needs memory for each.
pub const MOST: usize = if cfg!(feature = "threads") { 16 } else { 1 };

#[cfg(feature = "threads")]
thread_local! {
    /// Whether this thread shares nothing now, see [`alone`].
    static ALONE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Runs `f`, whose kernels stay on this thread.
#[cfg(feature = "threads")]
pub fn alone<T>(f: impl FnOnce() -> T) -> T {
    struct Restore(bool); // after a panic too
    impl Drop for Restore {
        fn drop(&mut self) {
            ALONE.set(self.0);
        }
    }
    let _restore = Restore(ALONE.replace(true));
    f()
}

/// Runs `f`, a network, while the pool's other threads look for its work and do not go to sleep: waking them takes longer than
/// most kernels. At most one network at a time keeps them awake, so that none can wait for another.
#[cfg(feature = "threads")]
pub fn awake<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    use std::sync::atomic::{AtomicBool, Ordering};
    static TAKEN: AtomicBool = AtomicBool::new(false);
    /// Set when it is dropped, after a panic too.
    struct Done<'a>(&'a AtomicBool, bool);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.store(self.1, Ordering::Release);
        }
    }
    let alone = ALONE.get() || rayon::current_num_threads() == 1;
    let Some(own) = rayon::current_thread_index().filter(|_| !alone) else { return f() };
    if TAKEN.swap(true, Ordering::AcqRel) {
        return f();
    }
    let _free = Done(&TAKEN, false);
    let done = AtomicBool::new(false);
    rayon::scope(|scope| {
        scope.spawn_broadcast(|_, thread| {
            while thread.index() != own && !done.load(Ordering::Acquire) {
                if rayon::yield_now() == Some(rayon::Yield::Idle) {
                    std::thread::yield_now();
                }
            }
        });
        let _done = Done(&done, true);
        f()
    })
}

/// `f`, where there is one thread.
#[cfg(not(feature = "threads"))]
pub fn awake<T>(f: impl FnOnce() -> T) -> T {
    f()
}

/// In how many parts a kernel with so many multiply-adds is done.
pub fn parts(work: usize) -> usize {
    #[cfg(feature = "threads")]
    {
        if ALONE.get() {
            return 1;
        }
        (work / GRAIN).clamp(1, rayon::current_num_threads().min(MOST))
    }
    #[cfg(not(feature = "threads"))]
    {
        let _ = work;
        1
    }
}

/// Calls `f` with every task, on several threads if there are several `parts`.
pub fn each<T: Send>(parts: usize, tasks: impl Iterator<Item = T>, f: impl Fn(T) + Send + Sync) {
    #[cfg(feature = "threads")]
    if parts > 1 {
        use rayon::prelude::*;
        return tasks.collect::<Vec<_>>().into_par_iter().with_max_len(1).for_each(f);
    }
    let _ = parts;
    tasks.for_each(f);
}
