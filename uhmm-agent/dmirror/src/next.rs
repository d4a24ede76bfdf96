//! The functions that are stood in for, as they are found behind this library.

use core::ffi::{CStr, c_void};
use core::marker::PhantomData;
use core::sync::atomic::{AtomicPtr, Ordering};

/// A function of type `F`, once it has been looked up.
///
/// # Invariants
///
/// `found` is null, or the address of a function of type `F`, which is a pointer to such.
#[derive(Debug)]
pub(crate) struct Next<F> {
    name: &'static CStr,
    found: AtomicPtr<c_void>,
    of: PhantomData<F>,
}

impl<F: Copy> Next<F> {
    /// A function that is not yet looked up.
    ///
    /// # Safety
    ///
    /// `F` is the type of a pointer to the function that libraries have by this name.
    pub(crate) const unsafe fn new(name: &'static CStr) -> Next<F> {
        const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
        // INVARIANT: null.
        Next { name, found: AtomicPtr::new(core::ptr::null_mut()), of: PhantomData }
    }

    /// Returns the function; `None` where there is none, as with another version of the C library.
    pub(crate) fn get(&self) -> Option<F> {
        // Relaxed: the address says all there is, and what is there was loaded with the program.
        let mut found = self.found.load(Ordering::Relaxed);
        if found.is_null() {
            // SAFETY: the name is a string that ends with a zero.
            found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
            // INVARIANT: what is found by this name is of type `F` (the contract of `new`).
            self.found.store(found, Ordering::Relaxed);
        }
        if found.is_null() {
            return None;
        }
        // SAFETY: `F` is a pointer to a function, of the size of one, and this is the address of one of
        // that type (the invariant).
        Some(unsafe { core::mem::transmute_copy(&found) })
    }
}

/// Defines stand-ins. Each is called with what the C library's function is called with, and either
/// answers, or returns `None` and has that one called. A function of the C library that takes a
/// variable number of arguments, of which all are integers or pointers, takes them where it would take
/// as many named ones, on the processors that there are.
macro_rules! stand_ins {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) -> $ret:ty => $answer:expr;)*) => {
        /// The functions that are stood in for.
        #[expect(non_upper_case_globals, reason = "they are called as the functions are")]
        mod found {
            use core::ffi::CStr;

            use super::*;
            $(
                pub(super) static $name: $crate::next::Next<unsafe extern "C" fn($($type),*) -> $ret> = {
                    const NAME: &CStr = $crate::next::cstr(concat!(stringify!($name), "\0"));
                    // SAFETY: the C library declares it so.
                    unsafe { $crate::next::Next::new(NAME) }
                };
            )*
        }

        /// Looks all of them up.
        pub(crate) fn find_all() {
            $( let _ = found::$name.get(); )*
        }

        $(
            $(#[$doc])*
            ///
            /// # Safety
            ///
            /// That of the C library's function.
            // SAFETY: it does what the C library's does.
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "C" fn $name($($arg: $type),*) -> $ret {
                let attempt = || -> Option<$ret> { $answer };
                if let Some(answer) = attempt() {
                    return answer;
                }
                match found::$name.get() {
                    // SAFETY: the caller's contract.
                    Some(next) => unsafe { next($($arg),*) },
                    None => $crate::fail(rustix::io::Errno::NOSYS),
                }
            }
        )*
    };
}
pub(crate) use stand_ins;

/// Makes a string of one that ends with a zero.
pub(crate) const fn cstr(name: &'static str) -> &'static CStr {
    match CStr::from_bytes_with_nul(name.as_bytes()) {
        Ok(name) => name,
        Err(_) => panic!("one zero, at the end"),
    }
}
