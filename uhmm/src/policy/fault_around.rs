//! What comes home along with a page that a CPU touches.

use super::{CpuFault, HomePlan, Policy, join};
use crate::page::Order;
use crate::primitive::{Mutex, lock};

/// A CPU's touch brings an aligned block of pages home, not one page.
///
/// A CPU that reads one page of a result mostly reads the next too, and a fault costs more than the
/// copy of a page. The default of 16 pages (64 KiB) is what Linux maps around a fault on a file.
/// It is safe because only pages that are in the same device's memory come along, and each of
/// those can go back.
///
/// Never makes a plan smaller: where an earlier policy or a large mapping asks for more, that
/// stays. Remembers nothing but its figure:
///
/// * `widened`: faults at which it asked for more than had been planned.
#[derive(Debug)]
#[doc(alias = "fault_around_bytes")]
pub struct FaultAround {
    order: Order,
    widened: Mutex<u64>,
}

impl FaultAround {
    /// The default size of the block: 16 pages.
    pub const ORDER: Order = Order::new(4).expect("4 is an order");

    /// Makes the policy with the default size.
    pub fn new() -> FaultAround {
        FaultAround { order: FaultAround::ORDER, widened: Mutex::new(0) }
    }

    /// Sets the size of the block that comes home. [`Order::PAGE`] turns the policy off.
    #[must_use]
    pub fn order(self, order: Order) -> FaultAround {
        FaultAround { order, ..self }
    }
}

impl Default for FaultAround {
    fn default() -> FaultAround {
        FaultAround::new()
    }
}

impl Policy for FaultAround {
    fn name(&self) -> &'static str {
        "fault around"
    }

    fn is_prompt(&self) -> bool {
        true
    }

    fn cpu_fault(&self, fault: &CpuFault, plan: &mut HomePlan) {
        let around = join(plan.range, fault.page.block(self.order));
        if around != plan.range {
            plan.range = around;
            *lock(&self.widened) += 1;
        }
    }

    fn figures(&self) -> Vec<(&'static str, u64)> {
        vec![("widened", *lock(&self.widened))]
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::page::Page;
    use crate::policy::testing::{cpu_fault, page};

    proptest! {
        #[test]
        fn the_plan_holds_the_block_and_what_was_planned_and_no_more(
            number in 0u64..5000, order in 0u8..7, mapped in 0u8..10
        ) {
            let order = Order::new(order).expect("an order");
            let mapped = Order::new(mapped).expect("an order");
            let policy = FaultAround::new().order(order);
            let planned = page(number).block(mapped);
            let mut plan = HomePlan { range: planned, nap: Duration::ZERO };
            policy.cpu_fault(&cpu_fault(page(number), mapped, 0), &mut plan);
            // Two aligned blocks around one page: one holds the other.
            let expected = page(number).block(order.max(mapped));
            prop_assert_eq!(plan, HomePlan { range: expected, nap: Duration::ZERO });
            prop_assert_eq!(policy.figures(), [("widened", u64::from(order > mapped))]);
        }
    }

    #[test]
    fn the_last_page_of_the_address_space_has_a_block_too() {
        let mut plan = HomePlan { range: Page::MAX.into(), nap: Duration::ZERO };
        FaultAround::new().cpu_fault(&cpu_fault(Page::MAX, Order::PAGE, 0), &mut plan);
        assert_eq!((plan.range.pages(), plan.range.last()), (16, Page::MAX));
    }
}
