//! Cross-memory attach: one process has the kernel write another's memory, with one copy. What UCX, and so NIXL, takes
//! between two processes of a host; nobody tells the other process.

use crate::end::{End, Memory};
use crate::pattern::{Slots, bytes};
use anyhow::{Context, bail, ensure};
use std::io;

/// Extents of one call, by the kernel's limit.
const EXTENTS: usize = 1024;

pub(crate) struct Cma {
    memory: Memory,
    peers: Vec<Peer>,
}

/// Another process, and where its landing memory begins there.
struct Peer {
    pid: i32,
    landing: usize,
}

impl Cma {
    pub(crate) fn new(memory: Memory) -> Cma {
        // SAFETY: the call takes numbers only. It fails where no Yama restricts who may attach, and so need not be asked.
        unsafe { libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY, 0, 0, 0) };
        Cma { memory, peers: Vec::new() }
    }
}

impl End for Cma {
    fn hello(&self) -> String {
        format!("{} {}", std::process::id(), self.memory.landing.base() as usize)
    }

    fn connect(&mut self, hellos: &[&str]) -> anyhow::Result<()> {
        for hello in hellos {
            let (pid, landing) = hello.split_once(' ').context("a process and an address")?;
            self.peers.push(Peer { pid: pid.parse()?, landing: landing.parse()? });
        }
        Ok(())
    }

    fn one(&mut self, slots: Slots, peer: usize, message: u64) -> anyhow::Result<()> {
        let peer = &self.peers[peer];
        let (mut local, mut remote) = (Vec::with_capacity(EXTENTS), Vec::with_capacity(EXTENTS));
        let mut extents = slots.message(message).peekable();
        while extents.peek().is_some() {
            let mut len = 0;
            local.clear();
            remote.clear();
            for extent in extents.by_ref().take(EXTENTS) {
                len += extent.len();
                let there = (peer.landing + extent.start) as *mut libc::c_void;
                remote.push(libc::iovec { iov_base: there, iov_len: extent.len() });
                let here = bytes(&self.memory.source, extent);
                local.push(libc::iovec { iov_base: here.as_ptr().cast_mut().cast(), iov_len: here.len() });
            }
            let counts = [local.len() as libc::c_ulong, remote.len() as libc::c_ulong];
            // SAFETY: the local ranges are inside our source, which nobody changes meanwhile, and are read only; both
            // lists live through the call. The other process's ranges are its landing memory, of the same layout, and
            // the kernel refuses what is not mapped there.
            let done = unsafe {
                libc::process_vm_writev(peer.pid, local.as_ptr(), counts[0], remote.as_ptr(), counts[1], 0)
            };
            if done < 0 {
                let error = io::Error::last_os_error();
                bail!(
                    "process_vm_writev: {error}; both processes need one user, and leave to attach (ptrace)"
                );
            }
            ensure!(done as usize == len, "process_vm_writev: {done} of {len} bytes");
        }
        Ok(())
    }
}
