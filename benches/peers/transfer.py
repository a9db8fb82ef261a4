#!/usr/bin/env python3
"""One process of NIXL or Mooncake, DRAM to DRAM: the peers that benches/transport is held against.

    python -m venv .venv && .venv/bin/pip install --no-deps -r benches/peers/transfer-requirements.txt
    target/release/transport --ways memcpy,shm,nixl,mooncake --peer .venv/bin/python

`transport` starts it and asks on its standard input, line by line, what it asks its own processes (end.rs), and lays
messages out alike (pattern.rs). Each engine is driven at its best: NIXL's transfers are prepared once and posted again
and again, by a sender without a progress thread; Mooncake's lists are made once. Memory is anonymous, in transparent
huge pages.
"""

import argparse
import base64
import collections
import ctypes
import importlib.metadata
import mmap
import os
import signal
import sys
import time

INSTALL = "pip install --no-deps -r benches/peers/transfer-requirements.txt"


class Slots(collections.namedtuple("Slots", "size extents count seed")):
    @property
    def extent_bytes(self):
        return self.size // self.extents

    def offset(self, slot, extent):
        return (extent * self.count + slot) * self.extent_bytes

    @property
    def depth(self):
        return max(1, self.count // 2)

    def words(self, np):
        """What the memory holds, piece by piece: where each begins, and its words."""
        end, piece = self.count * self.size // 8, 1 << 20
        seed = np.uint64(self.seed * 0xD1342543DE82EF95 % 2**64)
        for start in range(0, end, piece):
            index = np.arange(start, min(start + piece, end), dtype=np.uint64)
            yield start, (index ^ seed) * np.uint64(0x9E3779B97F4A7C15)


class Memory:
    """Source and landing memory."""

    def __init__(self, size, np):
        self.np = np
        self.source, self.landing = (self.map(size) for _ in range(2))

    def map(self, size):
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
        return self.np.frombuffer(pages, dtype=self.np.uint64)

    def fill(self, slots):
        for start, words in slots.words(self.np):
            self.source[start : start + len(words)] = words

    def verify(self, slots):
        for start, words in slots.words(self.np):
            wrong = self.np.flatnonzero(self.landing[start : start + len(words)] != words)
            if len(wrong):
                return f"wrong bytes at {(start + wrong[0]) * 8}"
        return "right"


class Nixl:
    package = "nixl"
    install = INSTALL

    def __init__(self, index, memory):
        os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
        from nixl._api import nixl_agent, nixl_agent_config

        self.memory, self.peers, self.prepared = memory, [], (None, [])
        # The sender's own waiting makes progress: a thread for it took half of the throughput on two cores. Receivers
        # need one.
        config = nixl_agent_config(backends=["UCX"], enable_prog_thread=index > 0)
        self.agent = nixl_agent(str(index), config)
        both = [(part.ctypes.data, part.nbytes, 0, "") for part in (memory.source, memory.landing)]
        self.agent.register_memory(both, "DRAM")

    def hello(self):
        return f"{self.memory.landing.ctypes.data} {base64.b64encode(self.agent.get_agent_metadata()).decode()}"

    def connect(self, hellos):
        for hello in hellos:
            address, metadata = hello.split(" ")
            name = self.agent.add_remote_agent(base64.b64decode(metadata))
            self.peers.append((name, int(address)))

    def strided(self, slots, slot, base):
        """The extents of a slot: address, bytes, device, distance, number."""
        lies = (base + slots.offset(slot, 0), slots.extent_bytes, 0, slots.count * slots.extent_bytes, slots.extents)
        return self.memory.np.array([lies], dtype=self.memory.np.uint64)

    def prepare(self, slots):
        """A transfer for each peer and slot."""
        shape = slots._replace(seed=0)
        if self.prepared[0] == shape:
            return
        for handles in self.prepared[1]:
            for handle in handles:
                handle.release()
        all_extents = self.memory.np.arange(slots.extents, dtype=self.memory.np.int32)
        of_peers = []
        for name, address in self.peers:
            handles = []
            for slot in range(slots.count):
                here = self.strided(slots, slot, self.memory.source.ctypes.data)
                there = self.strided(slots, slot, address)
                here = self.agent.prep_xfer_dlist("NIXL_INIT_AGENT", here, "DRAM")
                there = self.agent.prep_xfer_dlist(name, there, "DRAM")
                handles.append(self.agent.make_prepped_xfer("WRITE", here, all_extents, there, all_extents))
            of_peers.append(handles)
        self.prepared = (shape, of_peers)

    def post(self, peer, slot):
        handle = self.prepared[1][peer][slot]
        return handle, self.agent.transfer(handle)

    def wait(self, posted):
        handle, state = posted
        while state == "PROC":
            state = self.agent.check_xfer_state(handle)
        if state != "DONE":
            raise SystemExit(f"NIXL: a transfer ended as {state}")


class Mooncake:
    package = "mooncake-transfer-engine-non-cuda"
    install = f"{INSTALL} && apt install libibverbs1 libnuma1"

    def __init__(self, index, memory):
        # It logs every batch.
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        os.environ.setdefault("GLOG_minloglevel", "2")
        from mooncake.engine import TransferEngine

        self.memory, self.peers, self.prepared = memory, [], (None, [])
        self.host = os.environ.get("TWO_HOSTS_IP", "127.0.0.1")
        self.engine = TransferEngine()
        if self.engine.initialize(self.host, "P2PHANDSHAKE", "tcp", "") != 0:
            raise SystemExit("Mooncake: the engine did not start")
        for part in (memory.source, memory.landing):
            if self.engine.register_memory(part.ctypes.data, part.nbytes) != 0:
                raise SystemExit(f"Mooncake: {part.nbytes} bytes were not registered")

    def hello(self):
        return f"{self.memory.landing.ctypes.data} {self.host}:{self.engine.get_rpc_port()}"

    def connect(self, hellos):
        for hello in hellos:
            address, name = hello.split(" ")
            self.peers.append((name, int(address)))

    def prepare(self, slots):
        shape = slots._replace(seed=0)
        if self.prepared[0] == shape:
            return
        offsets = [[slots.offset(slot, extent) for extent in range(slots.extents)] for slot in range(slots.count)]

        def lists(base):
            return [[base + offset for offset in of_slot] for of_slot in offsets]

        self.lengths = [slots.extent_bytes] * slots.extents
        self.sources = lists(self.memory.source.ctypes.data)
        self.prepared = (shape, [lists(address) for _, address in self.peers])

    def post(self, peer, slot):
        there = self.prepared[1][peer][slot]
        batch = self.engine.batch_transfer_async_write(self.peers[peer][0], self.sources[slot], there, self.lengths)
        if batch == 0:
            raise SystemExit("Mooncake: a transfer was not taken")
        return batch

    def wait(self, batch):
        if self.engine.get_batch_transfer_status([batch]) != 0:
            raise SystemExit("Mooncake: a transfer failed")


def run(engine, slots, peers, seconds):
    """Message after message to the peers in turn, as many under way as there may be; the oldest is awaited first."""
    begun, sent, under_way = time.perf_counter(), 0, collections.deque()
    least, most = slots.count * peers, slots.depth * peers
    while sent <= least or time.perf_counter() - begun < seconds:
        under_way.append(engine.post(sent % peers, sent // peers % slots.count))
        sent += 1
        if len(under_way) == most:
            engine.wait(under_way.popleft())
    for posted in under_way:
        engine.wait(posted)
    return sent, time.perf_counter() - begun


def ping(engine, slots, most, seconds):
    """One message after the other: when each began and how long it took, in nanoseconds."""
    begun, answer = time.monotonic_ns(), []
    for message in range(most):
        start = time.monotonic_ns()
        engine.wait(engine.post(0, message % slots.count))
        end = time.monotonic_ns()
        answer += [start, end - start]
        if end - begun > seconds * 1e9:
            break
    return answer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=["nixl", "nixl-tcp", "mooncake"])
    parser.add_argument("index", type=int, help="0 sends to all others")
    parser.add_argument("region", type=int, help="bytes of source memory, and of landing memory")
    args = parser.parse_args()
    # It is stopped between samples, and must not stay so when whoever started it is gone.
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # What the engines print must not be taken for answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    kind = Mooncake if args.way == "mooncake" else Nixl
    try:
        import numpy

        memory = Memory(args.region, numpy)
        engine = kind(args.index, memory)
        version = importlib.metadata.version(kind.package)
    except ImportError as error:
        raise SystemExit(f"{args.way} is not installed for {sys.executable} ({error}): {kind.install}") from None
    if args.index == 0:
        print(f"{args.way}: {kind.package} {version}", file=sys.stderr)
    print(engine.hello(), file=answers)
    for line in sys.stdin:
        question, *words = line.rstrip("\n").split(" ")
        if question == "connect":
            engine.connect(" ".join(words).split("\t"))
            answer = "connected"
        elif question == "fill":
            slots = Slots(*map(int, words))
            memory.fill(slots)
            engine.prepare(slots)
            answer = "filled"
        elif question == "run":
            sent, took = run(engine, Slots(*map(int, words[2:])), int(words[0]), float(words[1]))
            answer = f"{sent} {took}"
        elif question == "ping":
            answer = " ".join(map(str, ping(engine, Slots(*map(int, words[2:])), int(words[0]), float(words[1]))))
        elif question == "verify":
            answer = memory.verify(Slots(*map(int, words)))
        elif question == "cpu":
            answer = time.process_time()
        else:
            raise SystemExit(f"no question: {line}")
        print(answer, file=answers)
    answers.close()
    # Both engines' threads may outlast, or crash in, an orderly end.
    os._exit(0)


if __name__ == "__main__":
    main()
