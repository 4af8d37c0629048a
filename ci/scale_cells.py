"""The server of the pool with a cell of one millisecond in the place of pytest, for `scale_bench.py`."""

from __future__ import annotations

import gc
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from prill_harness.plan import provenance
from prill_harness.recording import forked
from prill_harness.records.evidence import Cell, CellEnded, CellStarted, CheckStarted, Evidence, Status
from prill_harness.records.ledger import Ledger

CHECK, CODE = "synthetic.one", "c" * 64
MODELS = [f"model-{number}.gguf" for number in range(10)]
CELL_S = 0.001


def cell(given: Sequence[str] | None = None) -> int:
    """Compute for a millisecond, and write a whole ledger."""
    words = list(given or ())
    told = dict(zip(words[::2], words[1::2], strict=True))
    me = Cell(told["--model-name"], told["--engine"], told["--suite"], told["--device"])
    began, until = time.time(), time.perf_counter() + CELL_S
    versions = provenance.describe(told["--model"], Path(told["--suite-path"], "synthetic.py"))
    while time.perf_counter() < until:
        pass
    with Ledger(told["--ledger"]) as ledger:
        ledger.append(CellStarted(me, (CHECK,), began, versions))
        ledger.append(CheckStarted(me, CHECK, began))
        ledger.append(Evidence(
            CHECK, CODE, me, Status.PASSED, 1, "one value compared", "arithmetic", ("rope_pairing",),
            f"prill run {CHECK}", duration_s=CELL_S, at=began,
        ))  # fmt: skip
        ledger.append(CellEnded(me, 0, CELL_S, time.time()))
    return 0


if __name__ == "__main__":
    forked.cells.main = cell
    provenance.warm()
    for model in MODELS:
        provenance.model_facts(model)
    gc.freeze()
    sys.exit(forked.serve(socket.socket(fileno=int(sys.argv[1]))))
