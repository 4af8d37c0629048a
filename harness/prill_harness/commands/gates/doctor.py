"""`prill doctor`: what this machine has, what the default gate needs, and what to do about the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from prill_harness.commands.shared.declare import command as declare
from prill_harness.console import Console
from prill_harness.run.cells import THREADS
from prill_runtime.errors import PrillError

EXTRAS = {
    "hf": ("torch", "transformers"),
    "cuda": ("pycuda", "cuda.bindings", "cupti"),
    "memray": ("memray",),
    "dev": ("lxml", "mypy", "ruff"),
}


class Preflight(msgspec.Struct, frozen=True):
    """status: "ok", "missing" (optional) or "broken" (the default gate cannot run); todo: what to do."""

    name: str
    status: str
    sentence: str
    todo: str = ""


@declare(name="doctor", example="prill doctor\nprill doctor --json")
def command(console: Console) -> int:
    """Look at this machine: Python, packages, cache, fixtures, GPU, extras.

    Exit code 0 when the default gate can run, 1 when it cannot.
    """
    findings = [found for examine in EXAMINATIONS for found in _safely(examine)]
    broken = [f for f in findings if f.status == "broken"]
    console.emit({"ready": not broken, "findings": findings})
    console.table(
        ("what", "status", "found", "to do"),
        [(f.name, f.status, f.sentence, f.todo) for f in findings],
        status=1,
    )
    console.line()
    console.line(
        f"the default gate cannot run: {', '.join(f.name for f in broken)}"
        if broken
        else "the default gate can run",
        status="broken" if broken else "ok",
    )
    return 1 if broken else 0


def _safely(examine: Callable[[], Iterator[Preflight]]) -> Iterator[Preflight]:
    """The findings of one examination; if it raises, that is a finding."""
    try:
        yield from examine()
    except Exception as error:
        told = str(error) if isinstance(error, PrillError) else f"{type(error).__name__}: {error}"
        yield Preflight(
            examine.__name__.strip("_"), "broken", told, "run with --debug or install prill again"
        )


def _python() -> Iterator[Preflight]:
    found = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    good = sys.version_info >= (3, 11)
    yield Preflight(
        "python", "ok" if good else "broken", found, "" if good else "install Python 3.11 or newer"
    )


def _packages() -> Iterator[Preflight]:
    """Every dependency of prill itself, extras left out, with its version."""
    from packaging.requirements import Requirement

    for text in importlib.metadata.requires("prill") or ():
        need = Requirement(text)
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            yield Preflight(need.name, "broken", "not installed", f"pip install '{text}'")
            continue
        good = need.specifier.contains(version, prereleases=True)
        yield Preflight(
            need.name, "ok" if good else "broken", version, "" if good else f"pip install '{text}'"
        )


def _threads() -> Iterator[Preflight]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limits = ", ".join(f"{name}={os.environ[name]}" for name in THREADS if name in os.environ)
    yield Preflight(
        "threads", "ok", f"{cores} cores; BLAS takes one in each cell, {limits or 'all'} elsewhere"
    )


def _cache() -> Iterator[Preflight]:
    from prill_runtime import user_cache

    folder = user_cache.root()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        todo = "set PRILL_CACHE to a folder you can write"
        yield Preflight("cache", "broken", f"{folder}: {error.strerror}", todo)
        return
    yield Preflight("cache", "ok", f"{folder} is writable, {free / 2**30:.1f} GiB free")


def _models() -> Iterator[Preflight]:
    """Every model of the default gate's plan, and its golden."""
    from prill_harness.engines.models import resolve_model
    from prill_harness.tokens.golden import golden_for
    from prill_runtime.gguf.file import open_gguf

    for spec in _gate_models():
        try:
            with open_gguf(resolve_model(spec)) as file:
                digest = file.sha256
            recorded = golden_for(spec).fingerprint.model_sha256
        except PrillError as error:
            yield Preflight(spec, "broken", str(error), "install prill again, or clear the cache folder")
            continue
        good = digest == recorded
        sentence = f"sha256 {digest[:16]}" + ("" if good else f", but its golden is of {recorded[:16]}")
        yield Preflight(spec, "ok" if good else "broken", sentence, "" if good else "install prill again")


def _gate_models() -> tuple[str, ...]:
    from prill_harness.plan import policy

    gate = policy.load_policy(None).gate(None)
    return tuple(dict.fromkeys(model for entry in gate.plan for model in entry.models))


def _gpu() -> Iterator[Preflight]:
    """The GPU and its libraries; the default gate needs none of them."""
    driver = Path("/proc/driver/nvidia/version")
    if driver.is_file():
        numbers = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", driver.read_text(errors="replace"))
        yield Preflight("nvidia driver", "ok", numbers.group() if numbers else "present")
    else:
        yield Preflight("nvidia driver", "missing", "no NVIDIA driver", "needed by the engine cuda alone")
    tool = shutil.which("nvidia-smi")
    listed = _said([tool, "-L"]) if tool else []
    yield Preflight("gpu", "ok" if listed else "missing", "; ".join(listed) or "no GPU found")
    compiler = shutil.which("nvcc")
    said = _said([compiler, "--version"]) if compiler else []
    version = next((line for line in said if "release" in line), "found" if compiler else "not on the PATH")
    todo = "" if compiler else "install the CUDA toolkit for the engine cuda"
    yield Preflight("nvcc", "ok" if compiler else "missing", version, todo)


def _said(words: list[str]) -> list[str]:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _architectures() -> Iterator[Preflight]:
    """What other packages describe; one that is broken stops files of its architecture alone."""
    from prill_runtime.models import registry

    for name, points in registry.installed().items():
        try:
            registry.load(name)
        except PrillError as error:
            yield Preflight(f"architecture {name}", "missing", str(error), f"needed by files of {name} alone")
        else:
            yield Preflight(f"architecture {name}", "ok", points[0].value)


def _extras() -> Iterator[Preflight]:
    for extra, modules in EXTRAS.items():
        absent = [m for m in modules if not _importable(m)]
        sentence = f"without {', '.join(absent)}" if absent else ", ".join(modules)
        todo = f"pip install 'prill[{extra}]' if you need it" if absent else ""
        yield Preflight(f"extra {extra}", "missing" if absent else "ok", sentence, todo)


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _device() -> Iterator[Preflight]:
    """Whether the engines cuda and emu can run; the default gate needs neither."""
    from prill_runtime.device.machine.compile import compiler
    from prill_runtime.device.machine.cuda import cuda_state

    for part, there, sentence in cuda_state():
        todo = "" if there else "needed by the engine cuda alone"
        yield Preflight(f"cuda {part}", "ok" if there else "missing", sentence, todo)
    try:
        yield Preflight("emulator", "ok", f"compiled by {compiler('g++')[0]}")
    except PrillError as error:
        yield Preflight("emulator", "missing", str(error), "needed by the engine emu alone")


EXAMINATIONS = (_python, _packages, _threads, _cache, _models, _architectures, _gpu, _device, _extras)
