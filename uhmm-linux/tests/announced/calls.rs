//! Each call that is made in the place of the program has the kernel's own results.
