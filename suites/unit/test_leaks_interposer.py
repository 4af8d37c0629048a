"""The preloaded library counts every family exactly, through threads and fork, and fails what it must."""

from __future__ import annotations

from pathlib import Path

import pytest

from prill_harness.leaks.ledgers import build, native
from prill_runtime.errors import Inconclusive

from .preloaded import preloaded

PRELUDE = """
import ctypes, os, threading
from prill_harness.leaks.ledgers.native import EVERY_THREAD, THIS_THREAD, Interposer
libc = ctypes.CDLL(None)
for name in ("malloc", "calloc", "realloc", "reallocarray", "memalign", "aligned_alloc", "valloc", "pvalloc",
             "strdup", "mmap", "mremap"):
    getattr(libc, name).restype = ctypes.c_void_p
for name, kinds in {"malloc": "z", "calloc": "zz", "realloc": "pz", "reallocarray": "pzz", "memalign": "zz",
                    "aligned_alloc": "zz", "valloc": "z", "pvalloc": "z", "free": "p", "strdup": "p",
                    "malloc_usable_size": "p", "munmap": "pz", "mremap": "pzzi",
                    "mmap": "pziiil"}.items():
    types = {"z": ctypes.c_size_t, "p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_long}
    getattr(libc, name).argtypes = [types[k] for k in kinds]
libc.malloc_usable_size.restype = ctypes.c_size_t
it = Interposer()
def moved(work):
    work(); work()  # what ctypes caches is there
    before = it.totals(); result = work(); after = it.totals()
    return tuple(a - b for a, b in zip(after, before)), result
"""


def inside(script: str) -> str:
    """What a script prints in a process with the library preloaded."""
    return preloaded(PRELUDE + script)


FAMILIES = {
    "malloc": "libc.malloc(100)",
    "calloc": "libc.calloc(10, 10)",
    "realloc": "libc.realloc(None, 100)",
    "reallocarray": "libc.reallocarray(None, 10, 10)",
    "memalign": "libc.memalign(64, 100)",
    "aligned_alloc": "libc.aligned_alloc(64, 128)",
    "valloc": "libc.valloc(100)",
    "pvalloc": "libc.pvalloc(100)",
    "strdup": "libc.strdup(b'x' * 99)",
    "realloc grown": "libc.realloc(libc.malloc(10), 5000)",
    "realloc shrunk": "libc.realloc(libc.malloc(5000), 10)",
}


@pytest.mark.parametrize("call", FAMILIES.values(), ids=FAMILIES)
def test_a_block_is_counted_and_its_free_too(call: str) -> None:
    """Each family adds one block of the size malloc gave, and free takes exactly that away."""
    said = inside(f"""
(blocks, size, _), p = moved(lambda: {call})
usable = libc.malloc_usable_size(p)
assert (blocks, size) == (1, usable), (blocks, size, usable)
before = it.totals(); libc.free(p); after = it.totals()
assert (before[0] - after[0], before[1] - after[1]) == (1, usable)
print("counted")
""")
    assert said == "counted\n"


def test_mappings_are_counted_by_length() -> None:
    """mmap adds, mremap moves and munmap takes away whole pages; a file mapped over nothing counts too."""
    inside("""
def new(): return libc.mmap(None, 5000, 3, 0x22, -1, 0)
(_, _, size), p = moved(new)
assert size == 8192, size
before = it.totals()[2]; q = libc.mremap(p, 8192, 20480, 1); assert it.totals()[2] - before == 12288
before = it.totals()[2]; libc.munmap(q, 20480); assert it.totals()[2] - before == -20480
""")


def test_threads_balance_whoever_frees() -> None:
    """Blocks made by some threads and freed by others leave nothing in the sum of the shards."""
    inside("""
def crossing():
    blocks = []
    makers = [threading.Thread(target=lambda: blocks.extend(libc.malloc(40) for _ in range(500)))
              for _ in range(4)]
    for t in makers: t.start()
    for t in makers: t.join()
    breakers = [threading.Thread(target=lambda n=n: [libc.free(p) for p in blocks[n::4]]) for n in range(4)]
    for t in breakers: t.start()
    for t in breakers: t.join()
import gc
for _ in range(5): crossing(); gc.collect()
before = it.totals()[0]
for _ in range(5): crossing(); gc.collect()
assert abs(it.totals()[0] - before) < 100, it.totals()[0] - before  # of 10000 blocks
""")


def test_a_forked_child_counts_on() -> None:
    """A child starts from its parent's counts, also amid allocating threads, and counts its own."""
    inside("""
stop = False
def busy():
    while not stop: libc.free(libc.malloc(33))
threads = [threading.Thread(target=busy) for _ in range(3)]
for t in threads: t.start()
for _ in range(20):
    child = os.fork()
    if not child:
        def new(): return libc.malloc(1000)
        (blocks, size, _), p = moved(new)
        os._exit(0 if (blocks, size) == (1, libc.malloc_usable_size(p)) else 9)
    assert os.waitpid(child, 0)[1] == 0
stop = True
for t in threads: t.join()
""")


def test_the_nth_allocation_fails_once_and_no_other() -> None:
    """Of five allocations the third fails; smaller ones and those of other threads do not count."""
    said = inside("""
with it.failing(3, least=1000) as seen:
    libc.free(libc.malloc(10))
    got = [bool(libc.malloc(2000)) for _ in range(5)]
print(got, seen)
def elsewhere(scope):
    go, done, other = threading.Event(), threading.Event(), []
    def work():
        go.wait(); other.append(bool(libc.malloc(600000))); done.set()
    thread = threading.Thread(target=work); thread.start()
    with it.failing(1, least=500000, scope=scope):
        go.set(); done.wait()
        mine = bool(libc.malloc(600000))
    thread.join()
    return other[0], mine
print(elsewhere(THIS_THREAD), elsewhere(EVERY_THREAD))
""")
    assert said == "[True, True, False, True, True] [5, 1, 0]\n(True, False) (False, True)\n"


def test_the_plant_is_kept_and_given_back() -> None:
    """A planted block of 16 bytes shows as one of the size malloc gave, and goes with unplant."""
    inside("""
moves, usable = moved(lambda: it.plant(16))
assert usable in (24, 40) and moves == (1, usable, 0), (usable, moves)
moves, _ = moved(lambda: (it.plant(16), it.unplant()))
assert moves == (0, 0, 0), moves
""")


def test_the_process_is_read_without_a_trace() -> None:
    """Descriptors and threads are those that /proc shows, and reading leaves nothing behind."""
    inside("""
before = it.totals(), it.process()["descriptors"]
held = os.open(os.devnull, os.O_RDONLY)
assert it.process()["descriptors"] == before[1] + 1
assert it.process()["threads"] == len(os.listdir("/proc/self/task"))
assert it.process()["rss_anon"] > 1 << 20
""")


def test_without_preloading_there_is_no_ledger() -> None:
    """A process that was started plainly says that the ledger is not attached."""
    with pytest.raises(Inconclusive, match="not attached"):
        native.Interposer()


def test_without_a_compiler_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No compiler on the PATH: inconclusive, with what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(Inconclusive, match=r"no C compiler.*install gcc"):
        build.interposer()


def test_a_library_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The second request finds the file; other flags are another file."""
    monkeypatch.setenv("PRILL_CACHE", str(tmp_path))
    first = build.interposer()
    stamp = first.stat().st_mtime_ns
    assert build.interposer() == first
    assert first.stat().st_mtime_ns == stamp
    assert build.compiled("interposer.c", (*build.INTERPOSER, "-DOTHER")) != first
