"""Find kernels that spill registers to local memory."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from prill_runtime.device.machine import compile as kernels

_ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads", re.S
)


def spills(name: str, arch: str) -> dict[str, int]:
    """Bytes spilled, by kernel; empty if every kernel of the file fits into its registers.

    Raises:
        CompilerMissing: no nvcc, or it refuses the file, or reports on no kernel.
    """
    program, _ = kernels.compiler("nvcc")
    with tempfile.TemporaryDirectory() as folder:
        for file, text in {f"{name}.cu": kernels.source(name), **kernels.headers()}.items():
            (Path(folder) / file).write_text(text, encoding="utf-8")
        flags = kernels.KernelTarget(arch).flags
        words = [program, *flags, "-Xptxas", "-v", "-o", "out", f"{name}.cu"]
        said = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    seen = {kernel: int(stores) + int(loads) for kernel, stores, loads in _ENTRY.findall(said.stderr)}
    if said.returncode or set(seen) != set(kernels.signatures(name)):
        raise kernels.CompilerMissing(
            "nvcc did not report on every kernel", where=name, got=said.stderr[-200:]
        )
    return {kernel: nbytes for kernel, nbytes in seen.items() if nbytes}


def main(arch: str = "sm_90") -> int:
    """Compile every kernel; the exit code, 1 if one spills."""
    worst = 0
    for name in kernels.names():
        found = spills(name, arch)
        print(f"{name:20} {len(kernels.signatures(name)):3} kernels, {found or 'no spills'}")
        worst |= bool(found)
    return worst


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
