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
//! | [`growth`] | what new memory comes along with a page that is touched for the first time |
//! | [`staying`] | nothing: how much cannot leave, for the report |
//! | [`streams`] | who goes from page to page |
//! | [`room`] | who waits until something has left |

/// The name of the policy: what the `policy` of a [`Config`](crate::ledger::Config) is. There is no
/// other, and a process that is to have another is not managed.
pub const POLICY: &str = "second-chance";

pub(crate) mod account;
pub(crate) mod growth;
pub(crate) mod hand;
pub(crate) mod recall;
pub(crate) mod room;
pub(crate) mod staying;
pub(crate) mod streams;
