"""The shapes of the op suite: on either side of what each kernel divides by, and what they alone show."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prill_harness.faults.catalogue import catalogue
from prill_harness.faults.trial import blame
from prill_harness.records.evidence import Evidence
from prill_harness.records.ledger import read
from prill_runtime.device.machine import compile as kernels
from prill_runtime.device.ops import backend as cuda
from prill_runtime.device.ops import tensor_cores as tensor
from prill_runtime.ops import numpy as host
from prill_suites.ops_shapes import ATTENTION, HEAD_SIZES, about, attentions, drawn, products

from .commandline import child
from .kernel_constants import constants
from .test_experts import one_row_sizes

MODEL = "fixture:llama-tiny"
EXPERTS = ("options.route", "options.experts", "options.mix")
Shapes = dict[str, set[int]]


@dataclass(frozen=True)
class Axis:
    """What a constant divides.

    Attributes:
        unit: how many of the axis one of the constant is. step: how near sizes can come to it.
        tiled: no size is as small; those beside a multiple of it do. most: there is nothing larger.
    """

    name: str
    unit: int = 1
    step: int = 1
    tiled: bool = False
    most: int = 1 << 31

    def lacks(self, constant: int, sizes: set[int]) -> str:
        """Empty where sizes lie on either side of the constant, a step away at most; else what lacks."""
        edge = constant * self.unit
        if self.tiled:
            sizes = {edge + (size + edge // 2) % edge - edge // 2 for size in sizes if size > edge}
        below = edge == 1 or any(edge - self.step <= size < edge for size in sizes)
        above = edge >= self.most or any(edge < size <= edge + self.step for size in sizes)
        return " and ".join(["just below"] * (not below) + ["just above"] * (not above))


ELEMENTS = tuple(Axis(f"{op}.count") for op in ("swiglu", "gelu_tanh", "add"))
# What each constant divides. A kernel's constant that is neither here nor below fails the test.
AXES: dict[tuple[str, str], tuple[Axis, ...]] = {
    ("attention", "SPLIT"): (Axis("attention.keys"), Axis("decode.keys")),
    ("attention", "THREADS"): (Axis("attention.dim"),),
    ("attention_decode", "CLUSTER"): (Axis("decode.keys"),),
    ("attention_decode", "TILE"): (Axis("decode.keys"),),
    ("attention_decode", "THREADS"): (Axis("decode.queries", step=64), Axis("decode.keys")),
    ("attention_decode", "G"): (Axis("decode.group"),),
    ("attention_decode", "COLUMNS"): (Axis("decode.dim", unit=128, step=128, most=256),),
    ("cache", "threads"): (Axis("decode.appended", step=64),),
    ("choose", "THREADS"): (Axis("decode.vocabulary", tiled=True),),
    ("elementwise", "threads"): ELEMENTS,
    ("embed", "threads"): (Axis("embed.chunks"),),
    # Of a kernel with hooks and of one without, which are one text. BATCH: values of a quad, emulated.
    **{(file, "ROWS"): (Axis("decode.outer", tiled=True),) for file in ("fused", "hooked")},
    **{
        (file, "BATCH"): (
            Axis("decode.inner", unit=4 * 64, step=256), Axis("decode.width", unit=4 * 64, step=512),
        )
        for file in ("fused", "hooked")
    },
    ("experts", "N"): (Axis("experts.inner"),),
    # `route` loops over experts, `experts` over chunks, here of float32, `group` over rows.
    ("experts", "THREADS"): (
        Axis("route.experts"), Axis("experts.inner", unit=4, step=4), Axis("experts.rows"),
    ),
    ("experts", "threads"): (Axis("mix.count"),),
    ("tensor_experts", "OUTS"): (Axis("tensor_experts.outer"),),
    ("tensor_experts", "ROWS"): (Axis("tensor_experts.rows"),),
    ("tensor_experts", "AHEAD"): (Axis("tensor_experts.inner", unit=64, step=64),),
    # Of one row, which test_experts.py has: on the emulator a block has 64 threads.
    ("experts_decode", "ROUTER"): (Axis("router.chunks"),),
    ("experts_decode", "HELD"): (Axis("router.chunks", unit=256),),
    ("experts_decode", "ROWS"): (Axis("mixture.outer", tiled=True),),
    ("experts_decode", "BATCH"): (Axis("mixture.inner", unit=4 * 64, step=256),),
    ("experts_decode", "MOST_EXPERTS"): (Axis("mixture.experts", most=256),),
    ("experts_decode", "MOST_USED"): (Axis("mixture.used", most=16),),
    ("matmul", "TILE"): (Axis("matmul.rows"), Axis("matmul.outer")),
    ("matmul", "DEPTH"): (Axis("matmul.inner"),),
    ("matvec", "ROWS"): (Axis("matvec.outer"),),
    ("matvec", "THREADS"): (Axis("matvec.chunks"),),
    ("norm", "threads"): (Axis("rms_norm.width"), Axis("layer_norm.width")),
    ("prefill_attention", "KEYS"): (Axis("prefill.keys"),),
    ("prefill_attention", "DIM"): (Axis("prefill.dim", step=32),),
    ("rope", "threads"): (Axis("rope.threads"), Axis("rope.angles")),
    ("sample", "THREADS"): (Axis("sampler.vocabulary"),),
    ("sample", "BINS"): (Axis("sampler.vocabulary"),),
    ("sample", "LISTED"): (Axis("sampler.vocabulary"),),
    ("sample", "CHUNK"): (Axis("sampler.vocabulary"),),
    ("softmax", "threads"): (Axis("softmax.width"),),
    ("tensor", "OUTS"): (Axis("tensor.outer"),),
    ("tensor", "ROWS"): (Axis("tensor.rows"),),
    ("tensor", "AHEAD"): (Axis("tensor.inner", unit=64, step=64),),
    **{(file, "N"): (Axis("matvec.inner"), Axis("matmul.inner")) for file in ("matmul", "matvec")},
}  # fmt: skip
# Those that divide nothing of a shape, and why.
OTHERS = {
    r"(fused|hooked|experts_decode) (PLAIN|GATE_UP|QKV|NOWHERE)":
        "names of modes, and a group that no matrix has",
    r"(fused|hooked|experts_decode) (MOST|MOST_EXACT|threads)":
        "most threads of a launch; how many is the launcher's",
    r"(fused|hooked|experts_decode) (DEPTH|depth)":
        "loads in flight, in a loop of as many steps as a row has",
    r"\w+ RESIDENT": "blocks that a multiprocessor holds",
    r"\w+ ZERO": "a number's code",
    r"(embed|fused|hooked|experts_decode|tensor|tensor_experts|repack) N":
        "weights of a chunk: every type has products of its own above, mixtures in test_experts.py",
    r"(attention_decode|prefill_attention) (threads|WARPS|VALUES|OWN|APART|EACH|KEYS|STEP)":
        "follow from the others",
    r"attention_decode PIECE": "bytes asked for ahead of their use, of which no value depends",
    r"(fused|hooked|experts_decode) planes": "follows from the chunk",
    r"matmul (threads|chunks)": "follow from the tile and the chunk",
    r"matvec threads": "the same as THREADS",
    r"(choose|sample) threads": "the same as THREADS",
    r"repack threads": "chunks of a matrix, of which the products above take every one",
    r"sample (DIGIT|MOST_PASSES)": "bits that tell bins apart; more passes than any row takes",
    r"tensor(_experts)? (threads|THREADS|A_ROW|EACH|QUEUE|ACROSS|DOWN|HIGH|WIDE|MS|NS|HELD|STAGES?|TILES)":
        "follow from the tile and the chunk",
}  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Shapes:
    """What the op suite tried, by axis, as its evidence says."""
    out = tmp_path_factory.mktemp("shapes")
    said = child(
        "run", "--engine", "numpy", "--model", MODEL, "--out", str(out), "ops", "sampler.backend", *EXPERTS
    )
    assert said.returncode == 0, said.stdout + said.stderr
    found: Shapes = defaultdict(set)
    for record in read(out / "ledger.jsonl"):
        for axis, sizes in (record.detail if isinstance(record, Evidence) else {}).get("shapes", {}).items():
            found[axis] |= set(sizes)
    assert len(found) > 30
    return found | one_row_sizes()


def lacking(found: dict[str, dict[str, set[int]]], recorded: Shapes) -> list[str]:
    """One clause for every constant without shapes on either side, or that nobody knows."""
    clauses = []
    for file, named in found.items():
        for name, values in named.items():
            axes = AXES.get((file, name), ())
            if not axes and not any(re.fullmatch(known, f"{file} {name}") for known in OTHERS):
                clauses.append(f"{file}.cu, {name}: say which axis of a shape it divides")
            for axis in axes:
                clauses += [
                    f"{file}.cu, {name} {value}: no {axis.name} {lacks}"
                    for value in sorted(values)
                    if (lacks := axis.lacks(value, recorded[axis.name]))
                ]
    return clauses


def test_every_constant_of_a_kernel_has_shapes_on_either_side(recorded: Shapes) -> None:
    """Tiles, splits, threads and chunks, read from the sources: the op suite tried sizes just below and just
    above each, none larger than all and none smaller than all."""
    found = {name: constants(name) for name in kernels.names()}
    assert lacking(found, recorded) == []
    seen = {(file, name) for file, named in found.items() for name, values in named.items() if values}
    assert not set(AXES) - seen, "constants that no kernel has"


def test_a_constant_that_moves_is_noticed(recorded: Shapes) -> None:
    """Another tile, split or depth, or a new constant, has no shape beside it: the test above would fail."""
    for file, name, value in (
        ("attention", "SPLIT", 192), ("matmul", "TILE", 80), ("matmul", "DEPTH", 48), ("matvec", "ROWS", 6),
        ("tensor", "ROWS", 96), ("sample", "CHUNK", 8192), ("norm", "threads", 384), ("rope", "threads", 192),
        ("attention_decode", "TILE", 24), ("softmax", "threads", 2048), ("experts", "THREADS", 192),
        ("experts", "threads", 512), ("experts_decode", "ROUTER", 320), ("experts_decode", "HELD", 5),
        ("experts_decode", "MOST_EXPERTS", 128), ("experts_decode", "MOST_USED", 8),
        ("experts_decode", "BATCH", 8), ("tensor_experts", "ROWS", 96), ("tensor_experts", "OUTS", 192),
        ("tensor_experts", "AHEAD", 16),
    ):  # fmt: skip
        assert constants(file)[name]
        (clause, *_) = lacking({file: {name: {value}}}, recorded)
        assert clause.startswith(f"{file}.cu, {name} {value}: no ")
    assert lacking({"matmul": {"BANKS": {32}}}, recorded) == [
        "matmul.cu, BANKS: say which axis of a shape it divides"
    ]


def test_where_backends_change_kernels_has_shapes_on_either_side(recorded: Shapes) -> None:
    """Rows from which a product is tiled, or in half precision; rows of queries that NumPy takes at once."""
    rows = recorded["matvec.rows"] | recorded["matmul.rows"]
    few, tiled = cuda.MOST_MATVEC_ROWS, tensor.LEAST_TILE_ROWS
    assert {few, few + 1, tiled - 1, tiled} <= rows
    attended = recorded["attention.rows"] | recorded["prefill.rows"]
    assert {host.QUERY_ROWS - 1, host.QUERY_ROWS, host.QUERY_ROWS + 1} <= attended
    assert {tensor.LEAST_TILE_ROWS - 1, tensor.LEAST_TILE_ROWS} <= attended
    assert set(tensor.HEAD_SIZES) <= recorded["prefill.dim"]


def test_shapes_that_models_have_are_tried(recorded: Shapes) -> None:
    """Every head size of common models, more than 1,024 columns, more than 4,096 rows and outputs, odd rows
    past 300, one row over more than four splits of keys; whole decoding steps with each head size too."""
    assert {40, 64, 80, 96, 128, 256} == set(HEAD_SIZES)
    for op in ("attention", "rope", "decode"):
        assert set(HEAD_SIZES) <= recorded[f"{op}.dim"]
    assert max(recorded["matvec.inner"]) > 1024
    assert max(recorded["decode.width"]) > 1024
    assert max(recorded["decode.vocabulary"]) > 3 * 512  # parts that blocks choose from
    for op in ("embed.chunks", "swiglu.count", "gelu_tanh.count", "add.count"):
        assert max(recorded[op]) > 1 << 16
    assert any(columns % 128 and columns > 1024 for columns in recorded["tensor.inner"])  # splits not alike
    assert max(recorded["matmul.rows"]) > 4096
    assert max(recorded["matvec.outer"] | recorded["matmul.outer"]) > 4096
    assert any(rows > 300 and rows % 2 for rows in recorded["matmul.rows"])
    assert any(rows > 300 and rows % 2 for rows in recorded["prefill.rows"])
    assert max(recorded["decode.keys"]) > 4 * cuda.SPLIT_KEYS


def test_one_row_stands_at_every_length_and_in_every_head_size() -> None:
    """What decoding meets is drawn by itself, not when chance brings the two together; so is a prompt's."""
    cases = list(attentions(np.random.default_rng(0)))
    for some in ([case for case in cases if case[0] == 1], [case for case in cases if case[0] > 16]):
        assert {length for _, length, *_ in some} >= set(ATTENTION["keys"])
        assert {group for *_, group, _, _ in some} == set(ATTENTION["group"])
        assert {dim for *_, dim, _ in some} == set(ATTENTION["dim"])
        assert any(length > 4 * cuda.SPLIT_KEYS and window is None for _, length, *_, window in some)
    assert all(rows <= length for rows, length, *_ in cases)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from("abcd"),
        st.lists(st.integers(1, 5000), min_size=1, max_size=8, unique=True),
        min_size=1,
    ),
    st.integers(1, 10**6),
    st.integers(0, 2**32),
)
def test_every_size_is_drawn(axes: dict[str, list[int]], most: int, seed: int) -> None:
    """Each size of each axis occurs, and nothing else; over the limit is only one beside the least."""
    shapes = list(drawn(np.random.default_rng(seed), axes, most))
    for axis, sizes in axes.items():
        assert {shape[axis] for shape in shapes} == set(sizes)
    for shape in shapes:
        assert set(shape) == set(axes)
        large = sum(size > min(axes[axis]) for axis, size in shape.items())
        assert math.prod(shape.values()) <= most or large <= 1


def test_draws_are_the_same_every_time() -> None:
    """A check's shapes depend on its seed alone, so that its evidence can be reproduced."""
    for cases in (products, attentions):
        first, second = (list(cases(np.random.default_rng(7))) for _ in range(2))  # type: ignore[operator]
        assert first == second
        assert len(set(first)) > 50
    assert about(1, 4) == (1, 2, 3, 4, 5)


FAULTS = {
    "ops.attention": ("device_fifth_split", "device_head_tail", "device_wide_head", "device_shared_too_small",
                      "device_memory_taken_for_zero"),
    "ops.linear": ("device_columns_past_1024", "device_rows_past_4096", "device_odd_rows",
                   "device_shared_taken_for_zero", "device_registers_taken_for_zero"),
    "ops.rope": ("device_grid_rounded_down",),
    "ops.rms_norm": ("device_norm_past_1024",),
    "ops.softmax": ("device_static_not_reset",),
    "ops.decode[f16]": ("device_window_ignored",),
}  # fmt: skip


def test_every_fault_of_a_kernels_shapes_is_known() -> None:
    """None is left out of the test below."""
    declared = {name for name, fault in catalogue("emu").items() if fault.area == "shapes"}
    assert declared == {name for names in FAULTS.values() for name in names}


@pytest.mark.parametrize("check", FAULTS)
def test_faults_of_a_kernels_shapes_are_killed(check: str, tmp_path: Path) -> None:
    """The op's check passes on the emulator, fails with each fault, and blames the stage that it breaks."""
    engines = ["emu", *(f"emu+fault:{name}" for name in FAULTS[check])]
    options = [word for engine in engines for word in ("--engine", engine)]
    said = child("run", *options, "--model", MODEL, "--out", str(tmp_path), check, timeout=300)
    assert said.returncode == 1, said.stdout + said.stderr
    records = [record for record in read(tmp_path / "ledger.jsonl") if isinstance(record, Evidence)]
    sound = [record for record in records if record.cell.engine == "emu"]
    for name in FAULTS[check]:
        faulty = [record for record in records if record.cell.engine == f"emu+fault:{name}"]
        blamed = blame.blame(blame.kills(faulty, sound))
        assert blamed is not None, f"{name} survives"
        assert set(blamed.parts) & set(catalogue("emu")[name].blames), blamed
