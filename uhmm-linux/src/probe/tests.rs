//! What is decided, for kernels and users other than those at hand.

use super::words::MAPPINGS;
use super::*;

/// A kernel that has everything and permits everything, but for these.
fn probe_without(missing: &[Feature], refused: &[Feature]) -> Probe {
    let all = [
        Feature::Userfaultfd,
        Feature::UserModeFaults,
        Feature::EventFork,
        Feature::EventRemap,
        Feature::EventRemove,
        Feature::EventUnmap,
        Feature::ThreadId,
        Feature::Poison,
        Feature::WpAsync,
        Feature::Move,
        Feature::PagemapScan,
    ];
    let status = |feature: Feature| match feature {
        feature if missing.contains(&feature) => Err(Errno::NOSYS),
        feature if refused.contains(&feature) => Err(Errno::PERM),
        _ => Ok(()),
    };
    let bits = BITS.iter().filter(|(feature, _)| !missing.contains(feature));
    let mut offered: Features = bits.map(|&(_, bit)| bit).collect();
    offered.set(Features::EVENT_FORK, !missing.contains(&Feature::EventFork));
    Probe {
        kernel: "0.0".to_owned(),
        findings: all.map(|feature| Finding::of(feature, status(feature))).to_vec(),
        huge_pages: HugePages::Always,
        max_map_count: Some(MAPPINGS),
        locked_memory_limit: None,
        address_space_limit: None,
        overcommit: Overcommit::Heuristic,
        seccomp_filters: 0,
        userfaultfds: 0,
        locks_future_mappings: false,
        offered,
    }
}

#[test]
fn with_everything_everything_is_asked_for() {
    let plan = probe_without(&[], &[]).plan(false);
    assert_eq!((plan.faults, plan.migration), (Faults::All, Ok(())));
    let wanted = Features::EVENT_FORK | Features::EVENT_UNMAP | Features::MOVE | Features::POISON;
    assert!(plan.features.contains(wanted), "{:?}", plan.features);
    assert_eq!(probe_without(&[], &[]).remarks(), []);
}

#[test]
fn a_kernel_that_cannot_move_pages_moves_none() {
    let probe = probe_without(&[Feature::Move], &[]);
    assert_eq!(probe.migration(), Err(NoMigration::NoMove));
    let plan = probe.plan(true);
    assert_eq!(plan.migration, Err(NoMigration::NoMove));
    assert!(!plan.features.contains(Features::MOVE), "it is not asked for what it does not know");
    assert!(probe.remarks()[0].remedy.contains("later kernel"));
}

#[test]
fn a_kernel_that_does_not_tell_of_changes_moves_nothing() {
    for event in [Feature::EventRemap, Feature::EventRemove, Feature::EventUnmap] {
        let probe = probe_without(&[event], &[]);
        assert_eq!(probe.plan(true).migration, Err(NoMigration::NoEvents), "{event}");
    }
}

#[test]
fn what_is_offered_and_refused_is_not_asked_for() {
    let probe = probe_without(&[], &[Feature::EventFork]);
    let plan = probe.plan(false);
    assert_eq!((plan.faults, plan.migration), (Faults::All, Err(NoMigration::ForksUnseen)));
    assert!(!plan.features.contains(Features::EVENT_FORK));
    assert!(plan.features.contains(Features::EVENT_UNMAP), "events are there for mirrors");
    assert_eq!(probe.plan(true).migration, Ok(()));
}

#[test]
fn a_promise_about_forks_does_not_make_system_calls_wait() {
    let refused = [Feature::Userfaultfd, Feature::EventFork];
    let probe = probe_without(&[], &refused);
    let plan = probe.plan(true);
    assert_eq!(
        (plan.faults, plan.migration),
        (Faults::UserModeOnly, Err(NoMigration::UserModeOnly))
    );
    let text = probe.to_string();
    for word in ["not permitted", "vm.unprivileged_userfaultfd=1", "Pages cannot move to devices"] {
        assert!(text.contains(word), "{text}");
    }
}

#[test]
fn the_files_of_the_kernel_are_read_right() {
    assert_eq!(huge_pages("always [madvise] never\n"), HugePages::Madvise);
    assert_eq!(huge_pages("[always] madvise never\n"), HugePages::Always);
    assert_eq!(huge_pages("always madvise [never]\n"), HugePages::Never);
    assert_eq!(huge_pages(""), HugePages::Unknown);
    assert_eq!(overcommit("2\n"), Overcommit::Never);
    assert_eq!(overcommit("?"), Overcommit::Unknown);
    assert_eq!(seccomp_filters("Seccomp:\t0\nSeccomp_filters:\t0\n"), 0);
    assert_eq!(seccomp_filters("Seccomp:\t2\nSeccomp_filters:\t3\n"), 3);
    assert_eq!(seccomp_filters("Seccomp:\t2\n"), 1, "before 5.9 they are not counted");
    assert_eq!(seccomp_filters(""), 0);
}
