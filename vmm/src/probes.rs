//! Emits the probe table: one function per row, the only probe assembly.
//!
//! `probes::vm_stop(state, from_vcpu)` fires `vm_stop_begin`, opens the `tracing` span of the same
//! name and returns a guard; the guard's drop fires `vm_stop_end`, whatever way the function
//! leaves. [`Guarded::run`] puts a closure's result into `rc`. A point is a plain function.
//!
//! Guards are tied to their thread and nest, so spans do too. Each finished span also goes to the
//! thread's [span log](crate::spanlog), if one is open: that is what `query-migrate` shows.
#![allow(unsafe_code)]

use std::ffi::CStr;

use crate::spanlog;
pub use crate::spanlog::UNFINISHED;

/// What `rc` says of an error.
pub trait Errno {
    /// The positive errno that stands for this error in probes and in `query-migrate`.
    fn errno(&self) -> i32;
}

impl Errno for std::io::Error {
    fn errno(&self) -> i32 {
        self.raw_os_error().unwrap_or(libc::EIO)
    }
}

/// A span that is open: its end probe fires when it is dropped.
pub trait Guarded: Sized {
    /// Sets the result that the end probe will carry; [`UNFINISHED`] until then.
    fn set_rc(&mut self, rc: i64);

    /// Runs `body` inside the span and closes it with the result: 0, or the error's negative
    /// errno. `body` may set the other end arguments, which are the guard's fields.
    fn run<T, E: Errno>(mut self, body: impl FnOnce(&mut Self) -> Result<T, E>) -> Result<T, E> {
        let result = body(&mut self);
        self.set_rc(match &result {
            Ok(_) => 0,
            Err(error) => -i64::from(error.errno()),
        });
        result
    }
}

/// A table argument as the 64 bits that its probe carries.
trait Operand: Copy {
    fn operand(self) -> isize;
}

impl Operand for u64 {
    fn operand(self) -> isize {
        self.cast_signed() as isize
    }
}

impl Operand for i64 {
    fn operand(self) -> isize {
        self as isize
    }
}

impl Operand for &CStr {
    fn operand(self) -> isize {
        self.as_ptr().addr().cast_signed()
    }
}

/// The Rust type of a table argument.
macro_rules! argument {
    (u64) => { u64 };
    (i64) => { i64 };
    (str) => { &'static CStr };
    (borrowed str) => { &CStr };
    (borrowed $kind:ident) => { argument!($kind) };
}

/// What an end argument is until the span sets it.
macro_rules! unset {
    (rc $kind:ident) => {
        UNFINISHED
    };
    ($arg:ident u64) => {
        0
    };
    ($arg:ident i64) => {
        0
    };
    ($arg:ident str) => {
        c""
    };
}

/// The first string among a span's begin arguments is what the span log shows as its detail.
macro_rules! detail {
    () => { None };
    ($arg:ident str $($rest:tt)*) => { Some($arg) };
    ($arg:ident $kind:ident $($rest:tt)*) => { detail!($($rest)*) };
}

/// A function that is a probe's site and nothing else, without a semaphore.
///
/// All sites lie together: whoever attaches has the kernel copy the pages that they are on, for each
/// process, and copies one or two instead of one after the other of the stop path's. One copy of each
/// site, too: one that is inlined stands in the notes many times, with other registers in each.
///
/// The static keeps sites that one architecture never calls: the linker would drop their code and
/// leave their notes behind, which point nowhere then. So every monitor has every probe of the table.
macro_rules! site {
    ($name:ident $(, $first:ident $(, $rest:ident)*)?) => {
        #[cfg(not(feature = "no-probes"))]
        #[inline(never)]
        #[unsafe(link_section = "probes")]
        pub(super) extern "C" fn $name($($first: isize, $($rest: isize),*)?) {
            probe::probe!(vmm, $name $(, $first $(, $rest)*)?);
        }

        #[cfg(feature = "no-probes")]
        #[inline(always)]
        pub(super) extern "C" fn $name($($first: isize, $($rest: isize),*)?) {
            let _ = ($($first, $($rest),*)?);
        }

        const _: () = {
            #[used]
            static KEEP: extern "C" fn($($first: isize, $($rest: isize),*)?) = $name;
        };
    };
}

macro_rules! emit {
    () => {};
    (span $hop:literal $wait:ident $row:ident
        $begin:ident($($b:ident: $bkind:ident = $bdoc:literal),*)
        $end:ident($($e:ident: $ekind:ident = $edoc:literal),*)
        $doc:literal; $($rest:tt)*
    ) => {
        #[doc = concat!("The guard of `", stringify!($row), "`: ", $doc, ".")]
        pub mod $row {
            #[allow(unused_imports)]
            use super::*;

            /// Fires the end probe with these values when it is dropped.
            #[must_use = "the span ends when this is dropped"]
            pub struct Guard {
                $(#[doc = $edoc] pub $e: argument!($ekind),)*
                pub(super) log: spanlog::Open,
                pub(super) tracing: tracing::span::EnteredSpan,
            }

            impl Guarded for Guard {
                fn set_rc(&mut self, rc: i64) {
                    self.rc = rc;
                }
            }

            site!($begin $(, $b)*);
            site!($end $(, $e)*);

            impl Drop for Guard {
                #[inline(never)]
                fn drop(&mut self) {
                    $end($(self.$e.operand()),*);
                    self.tracing.record("rc", self.rc);
                    spanlog::close(&self.log, self.rc);
                }
            }
        }

        #[doc = concat!("Opens `", stringify!($row), "`: ", $doc, ".")]
        #[inline(never)]
        pub fn $row($($b: argument!(borrowed $bkind)),*) -> $row::Guard {
            let tracing = tracing::info_span!(
                stringify!($row), $($b = ?$b,)* rc = tracing::field::Empty
            ).entered();
            let log = spanlog::open(stringify!($row), $hop, detail!($($b $bkind)*));
            $row::$begin($($b.operand()),*);
            $row::Guard { $($e: unset!($e $ekind),)* log, tracing }
        }

        emit! { $($rest)* }
    };
    (point $hop:literal $row:ident($($a:ident: $kind:ident = $adoc:literal),*)
        $doc:literal; $($rest:tt)*
    ) => {
        #[doc = concat!("Fires `", stringify!($row), "`: ", $doc, ".")]
        #[inline]
        pub fn $row($($a: argument!(borrowed $kind)),*) {
            tracing::trace!($($a = ?$a,)* stringify!($row));
            $row::$row($($a.operand()),*);
        }

        mod $row {
            site!($row $(, $a)*);
        }

        emit! { $($rest)* }
    };
}

blackout_abi::probe_table!(emit);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spanlog::SpanLog;

    #[test]
    fn a_guard_records_its_result_however_the_function_leaves() {
        let log = SpanLog::open();
        let failed: Result<(), std::io::Error> = vm_stop(c"paused", 0)
            .run(|_| do_vm_stop(c"paused").run(|_| Err(std::io::ErrorKind::Other.into())));
        assert!(failed.is_err());
        drop(drain());
        let spans = log.finish();
        let seen: Vec<_> = spans
            .iter()
            .map(|s| (s.name.as_ref(), s.depth, s.rc))
            .collect();
        assert_eq!(
            seen,
            [
                ("vm_stop", 0, -i64::from(libc::EIO)),
                ("do_vm_stop", 1, -i64::from(libc::EIO)),
                ("drain", 0, UNFINISHED),
            ]
        );
        assert_eq!(spans[0].detail.as_deref(), Some("paused"));
    }
}
