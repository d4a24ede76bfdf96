//! What leaves, what comes home along with what is touched, and who waits.
//!
//! There is no bit that says whether the program has used a page: the kernel shows none, and to
//! write-protect memory that is not ours is not safe. What is known is what came home, since that
//! was needed. So a clock's [`hand`](hand) goes round the addresses, and what has come home since it
//! last came by has a second chance ([`recall`]). A working set that fits is home after two rounds,
//! and then nothing moves any more.
//!
//! | module | decides |
//! | --- | --- |
//! | [`account`] | how much there is |
//! | [`hand`] | what leaves |
//! | [`recall`] | what comes home along with a page that is touched, and has a second chance |
//! | [`room`] | who waits until something has left |

pub(crate) mod account;
pub(crate) mod hand;
pub(crate) mod recall;
pub(crate) mod room;
