//! What this crate relies on of the kernel: each fact is a test.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use crate::common::{PAGE, Server, byte, bytes, in_child, install, present, tracked, written, written_in};
use r3map_sys::{FaultScope, Install, Mapping, PAGE_SIZE, Protection, ScopeWanted};

const SIGBUS: i32 = 7;
const SIGSEGV: i32 = 11;

#[test]
fn pages_installed_clean_are_not_written_until_they_are() {
    let mut mapping = tracked(16);
    let pager = mapping.pager().clone();
    install(&pager, 0, 16);
    assert_eq!(written(&pager), [0; 0]);
    let view = mapping.as_mut_slice().unwrap();
    view[3 * PAGE] = 1;
    view[7 * PAGE + 5] = 1;
    view[8 * PAGE - 1] = 1;
    assert_eq!(written(&pager), [3, 7]);
    assert_eq!(written(&pager), [0; 0]);
    mapping.as_mut_slice().unwrap()[7 * PAGE] = 2;
    assert_eq!(written(&pager), [7]);
}

#[test]
fn reading_is_not_writing() {
    let mapping = tracked(4);
    install(mapping.pager(), 0, 4);
    assert_eq!(mapping.as_slice(), bytes(0, 4 * PAGE));
    assert_eq!(written(mapping.pager()), [0; 0]);
}

#[test]
fn pages_installed_as_written_are_written_once() {
    let mapping = tracked(2);
    mapping.pager().install(0, &bytes(0, 2 * PAGE), Install::Written).unwrap();
    assert_eq!(written(mapping.pager()), [0, 1]);
    assert_eq!(written(mapping.pager()), [0; 0]);
}

#[test]
fn zero_pages_are_clean_and_writes_to_them_are_found() {
    let mut mapping = tracked(8);
    let pager = mapping.pager().clone();
    pager.install_zeroes(0, 8 * PAGE_SIZE).unwrap();
    assert_eq!(mapping.as_slice(), [0; 8 * PAGE]);
    assert_eq!(written(&pager), [0; 0]);
    mapping.as_mut_slice().unwrap()[5 * PAGE + 1] = 9;
    assert_eq!(written(&pager), [5]);
    assert_eq!(mapping.as_slice()[5 * PAGE + 1], 9);
}

/// A write that falls between installing a zero page and protecting it must not be swallowed: only pages that still
/// are the shared page of zeros are protected.
#[test]
fn protecting_zero_pages_never_swallows_a_write() {
    let mut mapping = tracked(8);
    let pager = mapping.pager().clone();
    pager.install(3 * PAGE_SIZE, &[0; PAGE], Install::Written).unwrap();
    pager.install_zeroes(0, 3 * PAGE_SIZE).unwrap();
    pager.install_zeroes(4 * PAGE_SIZE, 4 * PAGE_SIZE).unwrap();
    // Covers page 3, that somebody else has filled with zeros of its own.
    pager.install_zeroes(0, 8 * PAGE_SIZE).unwrap();
    assert_eq!(written(&pager), [3]);
    mapping.as_mut_slice().unwrap().fill(0);
    assert_eq!(written(&pager), [0, 1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn missing_pages_count_as_written_and_can_be_filled_all_the_same() {
    let mapping = tracked(4);
    let pager = mapping.pager();
    install(pager, 1, 1);
    assert_eq!(written(pager), [0, 2, 3]);
    install(pager, 0, 4);
    assert_eq!(mapping.as_slice(), bytes(0, 4 * PAGE));
    assert_eq!(written(pager), [0; 0]);
}

#[test]
fn a_page_that_is_there_is_never_filled_again() {
    let mut mapping = tracked(4);
    let pager = mapping.pager().clone();
    install(&pager, 0, 2);
    mapping.as_mut_slice().unwrap()[..PAGE].fill(0xee);
    pager.install(0, &[0x11; 4 * PAGE], Install::Clean).unwrap();
    pager.install_zeroes(0, 4 * PAGE_SIZE).unwrap();
    pager.poison(0).unwrap();
    assert_eq!(mapping.as_slice()[..PAGE], [0xee; PAGE]);
    assert_eq!(mapping.as_slice()[PAGE..2 * PAGE], bytes(PAGE, PAGE));
    assert_eq!(mapping.as_slice()[2 * PAGE..], [0x11; 2 * PAGE]);
    assert_eq!(written(&pager), [0]);
}

#[test]
fn what_the_kernel_writes_for_the_program_is_tracked() {
    let mut mapping = tracked(8);
    let pager = mapping.pager().clone();
    install(&pager, 0, 8);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[7; 2 * PAGE]).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    file.read_exact(&mut mapping.as_mut_slice().unwrap()[3 * PAGE - 10..4 * PAGE]).unwrap();
    assert_eq!(written(&pager), [2, 3]);
    let mut parts = mapping.as_mut_slice().unwrap()[6 * PAGE..].chunks_mut(PAGE);
    let mut parts = [parts.next().unwrap(), parts.next().unwrap()].map(std::io::IoSliceMut::new);
    rustix::io::preadv(&file, &mut parts, 0).unwrap();
    assert_eq!(written(&pager), [6, 7]);
    assert_eq!(mapping.as_slice()[6 * PAGE..], [7; 2 * PAGE]);
}

#[test]
fn faults_of_the_kernel_are_served() {
    let mut mapping = tracked(4);
    assert_eq!(mapping.pager().scope(), FaultScope::UserAndKernel, "the tests run as root");
    let server = Server::start(mapping.pager());
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&mapping.as_slice()[PAGE..2 * PAGE]).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    file.read_exact(&mut mapping.as_mut_slice().unwrap()[2 * PAGE..3 * PAGE]).unwrap();
    assert_eq!(mapping.as_slice()[2 * PAGE..3 * PAGE], bytes(PAGE, PAGE));
    assert_eq!(server.stop(), 2);
}

#[test]
fn user_only_faults_fail_the_kernel_with_efault_and_never_with_zeros() {
    let mut mapping = Mapping::new(4 * PAGE_SIZE, Protection::Tracked, ScopeWanted::UserOnly).unwrap();
    assert_eq!(mapping.pager().scope(), FaultScope::UserOnly);
    let server = Server::start(mapping.pager());
    let mut file = tempfile::tempfile().unwrap();
    assert_eq!(file.write(&mapping.as_slice()[..PAGE]).unwrap_err().raw_os_error(), Some(14));
    assert_eq!(mapping.pager().read(0, &mut [0; 8]).unwrap_err().raw_os_error(), Some(14));
    // Touched first, it works: also for a write by the kernel, whose protection fault needs no handler.
    assert_eq!(mapping.as_slice()[PAGE], byte(PAGE));
    assert_eq!(file.write(&mapping.as_slice()[PAGE..2 * PAGE]).unwrap(), PAGE);
    std::io::Seek::rewind(&mut file).unwrap();
    file.read_exact(&mut mapping.as_mut_slice().unwrap()[PAGE..2 * PAGE]).unwrap();
    assert_eq!(written_in(mapping.pager(), 1, 2), [1]);
    assert_eq!(server.stop(), 1);
}

#[test]
fn a_poisoned_page_raises_sigbus() {
    if let Some(status) = in_child("facts::a_poisoned_page_raises_sigbus", &[]) {
        assert_eq!(status.signal(), Some(SIGBUS), "{status}");
        return;
    }
    let mapping = tracked(1);
    mapping.pager().poison(0).unwrap();
    std::hint::black_box(mapping.as_slice()[0]);
}

#[test]
fn a_poisoned_page_is_an_error_to_the_kernel_and_heals() {
    let mapping = tracked(4);
    let pager = mapping.pager();
    pager.poison(PAGE_SIZE).unwrap();
    pager.poison(2 * PAGE_SIZE).unwrap();
    assert!(pager.read(PAGE_SIZE, &mut [0; 8]).is_err());
    pager.heal(Duration::from_secs(3600)).unwrap();
    assert!(pager.read(PAGE_SIZE, &mut [0; 8]).is_err());
    // Filling heals what it fills, also with zeros.
    install(pager, 0, 2);
    pager.install_zeroes(2 * PAGE_SIZE, PAGE_SIZE).unwrap();
    pager.heal(Duration::ZERO).unwrap();
    assert_eq!(mapping.as_slice()[..2 * PAGE], bytes(0, 2 * PAGE));
    assert_eq!(mapping.as_slice()[2 * PAGE..3 * PAGE], [0; PAGE]);
    assert_eq!(written_in(pager, 0, 3), [0; 0]);
    // Or time does: then it is asked for anew.
    pager.poison(3 * PAGE_SIZE).unwrap();
    pager.heal(Duration::ZERO).unwrap();
    let server = Server::start(pager);
    assert_eq!(mapping.as_slice()[3 * PAGE], byte(3 * PAGE));
    assert_eq!(server.stop(), 1);
}

#[test]
fn a_page_that_was_filled_meanwhile_is_not_healed_away() {
    let mapping = tracked(2);
    mapping.pager().poison(0).unwrap();
    install(mapping.pager(), 0, 2);
    mapping.pager().heal(Duration::ZERO).unwrap();
    assert_eq!(present(mapping.pager()), [0, 1]);
}

#[test]
fn a_forked_child_gets_sigsegv_and_not_zeros() {
    let mapping = tracked(2);
    install(mapping.pager(), 0, 1);
    for page in 0..2 {
        // SAFETY: the child calls nothing that needs another thread: it reads one byte and exits.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let byte = std::hint::black_box(mapping.as_slice())[page * PAGE];
            // SAFETY: ends the child without running what belongs to its parent.
            unsafe { libc::_exit(byte.into()) };
        }
        let mut status = 0;
        // SAFETY: `status` is ours to write.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == SIGSEGV, "page {page}: status {status:#x}");
    }
    assert_eq!(mapping.as_slice()[0], byte(0));
}

#[test]
fn dropping_in_a_forked_child_leaves_the_parent_alone() {
    let mapping = tracked(2);
    install(mapping.pager(), 0, 2);
    // SAFETY: the child drops a mapping, which frees a little memory, and exits.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let ours = mapping.pager().is_ours();
        drop(mapping);
        // SAFETY: ends the child without running what belongs to its parent.
        unsafe { libc::_exit(ours.into()) };
    }
    let mut status = 0;
    // SAFETY: `status` is ours to write.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "status {status:#x}");
    assert_eq!(mapping.as_slice(), bytes(0, 2 * PAGE));
}

#[test]
fn a_sealed_mapping_raises_sigsegv_for_those_who_wait_too() {
    if let Some(status) = in_child("facts::a_sealed_mapping_raises_sigsegv_for_those_who_wait_too", &[]) {
        assert_eq!(status.signal(), Some(SIGSEGV), "{status}");
        return;
    }
    let mapping = tracked(1);
    let stop = r3map_sys::Event::new().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| std::hint::black_box(mapping.as_slice())[0]);
        let mut faults = Vec::new();
        while faults.is_empty() {
            mapping.pager().wait(&stop, &mut faults).unwrap();
        }
        mapping.pager().seal().unwrap();
    });
}

#[test]
fn locking_all_memory_beforehand_fills_no_page_with_zeros() {
    if let Some(status) = in_child("facts::locking_all_memory_beforehand_fills_no_page_with_zeros", &[]) {
        assert!(status.success(), "{status}");
        return;
    }
    rustix::mm::mlockall(rustix::mm::MlockAllFlags::FUTURE).unwrap();
    for protection in [Protection::ReadOnly, Protection::Tracked] {
        let mapping = Mapping::new(8 * PAGE_SIZE, protection, ScopeWanted::Widest).unwrap();
        assert_eq!(present(mapping.pager()), [0; 0]);
        let server = Server::start(mapping.pager());
        assert_eq!(mapping.as_slice(), bytes(0, 8 * PAGE));
        server.stop();
    }
}

#[test]
fn a_read_only_mapping_cannot_be_written_to() {
    if let Some(status) = in_child("facts::a_read_only_mapping_cannot_be_written_to", &[]) {
        assert_eq!(status.signal(), Some(SIGSEGV), "{status}");
        return;
    }
    let mut mapping = Mapping::new(PAGE_SIZE, Protection::ReadOnly, ScopeWanted::Widest).unwrap();
    mapping.pager().install(0, &bytes(0, PAGE), Install::Clean).unwrap();
    assert_eq!(mapping.as_slice(), bytes(0, PAGE));
    assert!(mapping.as_mut_slice().is_none());
    assert!(mapping.pager().collect(0..PAGE_SIZE, &mut |_| {}).is_err());
    // SAFETY: the page is mapped for this test; that it is not writable is what is tried.
    unsafe { mapping.as_ptr().write_volatile(1) };
}

const NOBODY: [&str; 5] = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"];

#[test]
fn without_privilege_user_only_faults_work_and_others_are_refused_with_advice() {
    let name = "facts::without_privilege_user_only_faults_work_and_others_are_refused_with_advice";
    if let Some(status) = in_child(name, &NOBODY) {
        assert!(status.success(), "{status}");
        return;
    }
    let all_allowed = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap().trim() == "1";
    let mapping = Mapping::new(2 * PAGE_SIZE, Protection::Tracked, ScopeWanted::Widest).unwrap();
    if !all_allowed {
        assert_eq!(mapping.pager().scope(), FaultScope::UserOnly);
        let refused = Mapping::new(1, Protection::Tracked, ScopeWanted::UserAndKernel).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
        for advice in ["vm.unprivileged_userfaultfd", "/dev/userfaultfd", "CAP_SYS_PTRACE"] {
            assert!(refused.to_string().contains(advice), "{refused}");
        }
    }
    let server = Server::start(mapping.pager());
    assert_eq!(mapping.as_slice(), bytes(0, 2 * PAGE));
    assert_eq!(written(mapping.pager()), [0; 0]);
    server.stop();
}
