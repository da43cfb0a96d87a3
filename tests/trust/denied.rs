//! A system that lets nobody use tiles: everything runs without them, and is right.

use crate::definitions::{OPERATIONS, check};
use crate::support::with_threads;
use linattn::{Isa, Precision, Runtime};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter_all_threads,
};
use std::process::Command;

/// Names the instruction sets that a process without tiles must find; set for such a process only.
const EXPECTED: &str = "LINATTN_TEST_WITHOUT_TILES";

/// Those that need no permission.
fn vectors() -> String {
    let names = Isa::detected().filter(|isa| *isa != Isa::Amx).map(Isa::name);
    names.collect::<Vec<_>>().join(" ")
}

/// From here on, this process is not given tiles: the filter answers for the system, and cannot be taken off.
fn deny_tiles() {
    const ARCH_PRCTL: i64 = 158;
    const REQUEST: u64 = 0x1023;
    let asks = SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, REQUEST);
    let rule = SeccompRule::new(vec![asks.expect("a condition")]).expect("a rule");
    let filter = SeccompFilter::new(
        [(ARCH_PRCTL, vec![rule])].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(1),
        TargetArch::x86_64,
    );
    let program: BpfProgram = filter.expect("a filter").try_into().expect("a program");
    apply_filter_all_threads(&program).expect("a system that filters");
    let status = std::fs::read_to_string("/proc/thread-self/status").expect("a status");
    assert!(status.lines().any(|l| l.split_whitespace().eq(["Seccomp:", "2"])), "{status}");
}

#[test]
fn tiles_that_are_denied_are_not_missed() {
    if let Ok(expected) = std::env::var(EXPECTED) {
        deny_tiles();
        assert_eq!(vectors(), expected, "more is missing than tiles");
        for precision in [Precision::F32, Precision::Bf16x3, Precision::Bf16] {
            let rt = Runtime::builder().precision(precision).build().expect("a runtime");
            assert!(rt.isa() != Isa::Amx && rt.engine() == "f32", "{rt:?}");
            if let Ok(rt) = Runtime::builder().isa(Isa::Amx).precision(precision).build() {
                assert!(rt.isa() != Isa::Amx && rt.engine() == "f32", "{rt:?}");
            }
        }
        for isa in Isa::detected().filter(|isa| *isa != Isa::Amx) {
            with_threads(isa, None);
        }
        return OPERATIONS.iter().for_each(|(name, op)| check(name, 8, *op));
    }
    let name = "denied::tiles_that_are_denied_are_not_missed";
    let program = std::env::current_exe().expect("a test program");
    let child = Command::new(program).args(["--exact", name]).env(EXPECTED, vectors()).output();
    let child = child.expect("a process");
    let [out, err] = [&child.stdout, &child.stderr].map(|x| String::from_utf8_lossy(x));
    assert!(child.status.success() && out.contains("1 passed"), "{out}{err}");
}
