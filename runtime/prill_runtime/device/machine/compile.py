"""Compile kernel files into the user's cache, and read the layout of their argument structs."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np

from prill_runtime import user_cache
from prill_runtime.device.machine import formats
from prill_runtime.errors import PrillError, UsageError

FOLDER: Final = Path(__file__).parents[1] / "kernels"
SANITIZE_VARIABLE: Final = "PRILL_EMU_SANITIZE"
"""Set to 1 to build the emulator's kernels with address and UB sanitizers (`make emu-sanitize`)."""

SCALARS: Final = {"int": "<i4", "float": "<f4", "long long": "<i8", "double": "<f8"}
_INCLUDED: Final = re.compile(r'#include "(.+?)"')
EMULATED: Final = (
    "-x", "c++", "-std=c++17", "-O2", "-fPIC", "-shared", "-DPRILL_EMU", "-Wno-unknown-pragmas",
    "-ffp-contract=off",
    # Memory that was never written must not read as zero: locals start as a pattern, reads of statics that
    # are never written are kept, and the library has no statics but the kernels' (see emu.h). g++'s pattern
    # is the byte 0xfe, which no option changes: a half is NaN, a float -1.7e38, which shows in a sum, not in
    # a maximum.
    "-ftrivial-auto-var-init=pattern", "-fno-ipa-reference-addressable", "-nostartfiles",
)  # fmt: skip
SANITIZED: Final = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
DEVICE: Final = ("-std=c++17", "-O3", "-cubin", "-lineinfo")


class CompilerMissing(UsageError):
    """No compiler for the kernels was found, or it failed."""

    noun = "cannot compile the kernels"


@dataclass(frozen=True)
class KernelTarget:
    """What kernels are compiled for: `emu`, or an architecture such as `sm_90`."""

    name: str
    sanitize: bool = False

    @property
    def emulated(self) -> bool:
        return self.name == "emu"

    @property
    def flags(self) -> tuple[str, ...]:
        if self.emulated:
            return EMULATED + (SANITIZED if self.sanitize else ())
        return (*DEVICE, f"-arch={self.name}")

    @property
    def compiler(self) -> str:
        return "g++" if self.emulated else "nvcc"


def emulator_target() -> KernelTarget:
    """The emulator, with sanitizers if the environment asks for them."""
    return KernelTarget("emu", os.environ.get(SANITIZE_VARIABLE) == "1")


def names() -> tuple[str, ...]:
    """Every kernel file, without its suffix."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.cu")))


def source(name: str) -> str:
    """The text of one kernel file.

    Raises:
        UsageError: no such file.
    """
    path = FOLDER / f"{name}.cu"
    if not path.is_file():
        raise UsageError("no such kernel file", expected=" or ".join(names()), got=repr(name))
    return _text(path)


@cache
def _text(path: Path) -> str:
    """A source file, read once: every device that is opened asks for all of them."""
    return path.read_text(encoding="utf-8")


def waits(name: str) -> bool:
    """Whether a file's kernels call wait_for_previous(), in the file or in a header that it includes, and so
    may overlap the launch before them."""
    pending, seen, known = [source(name)], set[str](), headers()
    while pending:
        text = pending.pop()
        if "wait_for_previous();" in text:
            return True
        new = set(_INCLUDED.findall(text)) & set(known) - seen
        seen |= new
        pending += [known[header] for header in new]
    return False


def headers() -> dict[str, str]:
    """The text of every header, by file name; the one of the formats is generated."""
    found = sorted([*FOLDER.glob("*.cuh"), *FOLDER.glob("*.h")])
    return {path.name: _text(path) for path in found} | {formats.HEADER: formats.table()}


@cache
def compiler(name: str) -> tuple[str, str]:
    """Path and version of a compiler.

    Raises:
        CompilerMissing: it is not on the PATH.
    """
    found = shutil.which(name)
    if found is None:
        package = "the CUDA toolkit" if name == "nvcc" else "g++"
        raise CompilerMissing(
            f"{name} is not on the PATH", expected=name, hint=f"install {package}, or put it on the PATH"
        )
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    return found, said.stdout


def build(name: str, target: KernelTarget, extra: Sequence[str] = ()) -> Path:
    """The compiled kernel file, from the cache if source, headers, flags and compiler are unchanged.

    Processes that ask for the same one wait for the first of them.

    Raises:
        CompilerMissing: no compiler, or it failed.
        UsageError: no such kernel file, or a cache folder that others may write.
    """
    program, version = compiler(target.compiler)
    text, shared, flags = source(name), headers(), [*target.flags, *extra]
    parts = [text, *(f"{file}\n{content}" for file, content in shared.items()), *flags, version]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    ending = ".so" if target.emulated else ".cubin"
    done = user_cache.folder("kernels") / f"{name}-{target.name}-{key[:24]}{ending}"
    return user_cache.kept(done, lambda file: _compile(name, text, shared, [program, *flags], file))


def _compile(name: str, text: str, shared: dict[str, str], words: list[str], into: Path) -> None:
    """Write the sources into a temporary folder and compile them into a file."""
    with tempfile.TemporaryDirectory(dir=into.parent, prefix=f".{name}.") as work:
        for file, content in {f"{name}.cu": text, **shared}.items():
            (Path(work) / file).write_text(content, encoding="utf-8")
        said = subprocess.run(
            [*words, "-o", str(into), f"{name}.cu"], cwd=work, capture_output=True, text=True, check=False
        )
    if said.returncode:
        first = next((line for line in said.stderr.splitlines() if "error" in line), said.stderr[-200:])
        raise CompilerMissing(f"{Path(words[0]).name} refused {name}.cu", got=first.strip())


_STRUCT = re.compile(r"^struct (\w+) \{\n(.*?)^\};", re.M | re.S)
_COMMENT = re.compile(r"//.*")
_FIELD = re.compile(r"^\s*(?:const )?([\w ]+?)\s*(\*?) (\w+);", re.M)
_KERNEL = re.compile(
    r"^(KERNEL|CLUSTER_KERNEL|KERNELS|KERNELS_OF_VALUES|KERNELS_OF_BLOCKS)\((\w+), (\w+), (\w+)", re.M
)
_DEFINE = re.compile(r"^#define (\w+) (\d+)$", re.M)


@dataclass(frozen=True)
class Signature:
    """A kernel's argument struct, and the most threads that one of its blocks may have."""

    layout: np.dtype[np.void]
    threads: int


def signatures(name: str) -> dict[str, Signature]:
    """Every kernel of a file, by name.

    Raises:
        PrillError: a declaration that cannot be read.
    """
    shared = headers()
    return dict(
        _declared(name, source(name), tuple(shared[file] for file in shared if file.endswith(".cuh")))
    )


@cache
def _declared(name: str, text: str, shared: tuple[str, ...]) -> dict[str, Signature]:
    bodies: dict[str, str] = {}
    for part in (*shared, text):
        bodies |= {struct[1]: _COMMENT.sub("", struct[2]) for struct in _STRUCT.finditer(part)}
    defines = {match[1]: int(match[2]) for match in _DEFINE.finditer(text)}
    found: dict[str, Signature] = {}
    for kind, kernel, args, threads in _KERNEL.findall(text):
        if args not in bodies:
            raise PrillError("a kernel takes an unknown struct", where=f"{name}.cu, {kernel}", got=args)
        signature = Signature(_layout(args, bodies), defines.get(threads) or int(threads))
        suffixes = {
            "KERNEL": (),
            "CLUSTER_KERNEL": (),
            "KERNELS": formats.VALUES + formats.BLOCKS,
            "KERNELS_OF_VALUES": formats.VALUES,
            "KERNELS_OF_BLOCKS": formats.BLOCKS,
        }[kind]
        found |= {f"{kernel}_{each}": signature for each in suffixes} or {kernel: signature}
    return found


def _layout(struct: str, bodies: dict[str, str]) -> np.dtype[np.void]:
    """The layout of a struct of pointers, scalars and other structs, aligned as in C."""
    fields: list[tuple[str, np.dtype[np.void] | str]] = []
    for match in _FIELD.finditer(bodies[struct]):
        kind, pointer, field = match[1].strip(), match[2], match[3]
        if not pointer and kind not in SCALARS and kind not in bodies:
            raise PrillError("a struct has a field of an unknown type", where=struct, got=f"{kind} {field}")
        fields.append((field, "<u8" if pointer else SCALARS.get(kind) or _layout(kind, bodies)))
    return np.dtype(fields, align=True)
