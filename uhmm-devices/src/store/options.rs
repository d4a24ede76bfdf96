//! How a store is made.

use uhmm::{Injector, Order};

use super::content::Verification;

/// How a store is made. The defaults take as much as there is, and verify nothing.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    limit: Option<u64>,
    largest: Order,
    verification: Verification,
    injector: Option<Injector>,
}

impl StoreOptions {
    /// Makes the default options.
    pub fn new() -> StoreOptions {
        StoreOptions::default()
    }

    /// Limits what is taken to keep pages in, in bytes: memory in slabs, or extents of the file.
    /// Tables, some 16 bytes a page, are not counted.
    #[must_use]
    pub fn limit_bytes(mut self, bytes: u64) -> StoreOptions {
        self.limit = Some(bytes);
        self
    }

    /// Gives out no block that is larger, so that whoever touches one page does not wait for all of
    /// a larger block to come home. The default is the largest that a store can give,
    /// [`Order::HUGE`].
    #[must_use]
    pub fn largest_block(mut self, order: Order) -> StoreOptions {
        self.largest = order.min(Order::HUGE);
        self
    }

    /// Sets whether what comes out is compared with what went in. The default does not.
    #[must_use]
    pub fn verification(mut self, verification: Verification) -> StoreOptions {
        self.verification = verification;
        self
    }

    /// Sets what makes steps fail: `allocate`, `copy` and `clear`, each once for each block, and in
    /// a file `reserve` and `release`, for each extent. The default asks nobody.
    #[must_use]
    pub fn injector(mut self, injector: Injector) -> StoreOptions {
        self.injector = Some(injector);
        self
    }

    pub(super) fn limit(&self) -> Option<u64> {
        self.limit
    }

    pub(super) fn largest(&self) -> Order {
        self.largest
    }

    pub(super) fn verify(&self) -> &Verification {
        &self.verification
    }

    /// Tells whether a step is to fail now.
    pub(super) fn fails(&self, step: &'static str) -> bool {
        self.injector.as_ref().is_some_and(|injector| injector.fails(step))
    }
}

impl Default for StoreOptions {
    fn default() -> StoreOptions {
        let (limit, largest) = (None, Order::HUGE);
        StoreOptions { limit, largest, verification: Verification::Off, injector: None }
    }
}
