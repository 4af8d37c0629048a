"""What `prill new` generated, filled in its own places alone, passes what its next steps say."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

import prill_harness.engines.others.capi as capi
from prill_harness.engines.others.capi import build
from prill_harness.records.evidence import Status
from prill_harness.records.verdict import ItemStatus, Verdict

from .commandline import child
from .test_adapter_guide import GUIDE, steps
from .test_new import MODEL, begun, prill

Made = Callable[[Path], str]
HERE = Path(next(iter(capi.__path__)))
WORKER = {
    "hello": """
    from prill_harness.engines.connect import connect
    from prill_harness.engines.spec import EngineSpec

    global engine
    engine = connect(EngineSpec.parse("numpy"), model)
""",
    "tokenize": "    return engine.tokenize(text, add_special)\n",
    "detokenize": '    return engine.detokenize(ids).decode("utf-8", "surrogateescape")\n',
    "logits": "    return engine.logits(ids).tolist()\n",
    "generate": """    made = engine.generate(ids, max_tokens=max_tokens, on_token=on_token, **sampling)
    return {name: getattr(made, name) for name in ("ids", "logprobs", "finish_reason", "end_id")}
""",
}
"""Call -> the code that fills it."""
UNFILLED = re.compile(r'    (?:\(void\).*;\n    )?return unfilled\("(\w+)"\);\n')
SIGNATURE = re.compile(r"^\w+ (prill_\w+)\(([^)]*)\)\s*\{", re.MULTILINE)
LOOKED_AT = ("boundary.interface", "boundary.freed", "boundary.logits")


def worker(folder: Path) -> str:
    """The spec of a generated worker whose calls are filled with an engine of prill's."""
    begun(folder, "engine", "exec", "mine")
    file = folder / "mine" / "mine.py"
    text = file.read_text("utf-8")
    for call, code in WORKER.items():
        text, count = re.subn(
            rf'(def {call}\(.*\):\n(?:    """(?:.|\n)*?"""\n)?)(?:    raise Unfilled\(.*\)\n)?',
            rf"\1{code}",
            text,
        )
        assert count == 1, call
    assert "raise Unfilled" not in text
    text = text.replace('"config": {}', '"config": dict(engine.info.config)')
    file.write_text(text, "utf-8")
    return f"exec:{sys.executable} mine/mine.py"


def library(folder: Path) -> str:
    """The spec of a generated library whose calls are filled with those of the example engine, renamed."""
    begun(folder, "engine", "capi", "mine")
    file = folder / "mine" / "mine.c"
    text = file.read_text("utf-8")
    arguments = {
        call: ", ".join(re.findall(r"(\w+)(?:,|$)", given) if given != "void" else [])
        for call, given in SIGNATURE.findall(text)
    }
    calls = UNFILLED.findall(text)
    assert len(calls) == len(arguments) - 2  # the version and the last error are whole as generated
    text = UNFILLED.sub(lambda found: f"    return example_{found[1]}({arguments[found[1]]});\n", text)
    last = text.index("{", text.index("prill_code prill_last_error"))
    text = f"{text[:last]}{{ return example_prill_last_error({arguments['prill_last_error']}); }}\n"
    heads = [f"{head} example_{call}({given});" for head, call, given in
             re.findall(r"^(prill_code) (prill_\w+)\(([^)]*)\)", text, re.MULTILINE)]  # fmt: skip
    text = text.replace(
        '#include "prill_engine.h"\n', '#include "prill_engine.h"\n' + "\n".join(heads) + "\n"
    )
    begins, ends = text.index("static _Thread_local"), text.index("uint32_t prill_abi_version")
    file.write_text(text[:begins] + text[ends:], "utf-8")
    renamed = [f"-D{call}=example_{call}" for call in arguments]
    sources = [str(HERE / name) for name in build.ENGINE]
    common = ["cc", *build.FLAGS, "-O1", f"-I{HERE}"]
    for number, source in enumerate(sources):
        subprocess.run([*common, *renamed, "-c", source, "-o", f"{number}.o"], cwd=folder, check=True)
    objects = [f"{number}.o" for number in range(len(sources))]
    flags = [flag for flag in common if flag != "-fvisibility=hidden"]
    subprocess.run([*flags, "-Werror", "-shared", "mine/mine.c", *objects, "-lm", "-o", "mine/libmine.so"],
                   cwd=folder, check=True)  # fmt: skip
    return "capi:mine/libmine.so"


def adapter(folder: Path) -> Path:
    """Where a generated architecture is installed, filled with the guide's."""
    begun(folder, "adapter", "magpie")
    files = {step.file: step.text for step in steps(GUIDE) if step.file.endswith(".py")}
    for name in ("prill_magpie.py", "magpie_second.py"):
        place = folder / "magpie" / name
        assert "fill " in place.read_text("utf-8")
        place.write_text(files[name], "utf-8")
    info = folder / "magpie" / "prill_magpie-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: prill-magpie\nVersion: 0.1\n")
    entries = (folder / "magpie" / "pyproject.toml").read_text("utf-8").split("[project.entry-points.")[1:]
    lines = [each.replace('"', "").split("[tool")[0] for each in entries]
    (info / "entry_points.txt").write_text("".join(f"[{line}" for line in lines))
    subprocess.run([sys.executable, "-c", files["make.py"]], cwd=folder, check=True)
    return folder / "magpie"


def test_a_filled_worker_passes(tmp_path: Path) -> None:
    """Ids, tokens and numbers of a generated worker with three calls filled are right."""
    spec = worker(tmp_path)
    checks = ("contract.tokenization", "contract.tokens")
    said = prill(tmp_path, "run", *checks, "--engine", spec, "--model", MODEL, code=0)
    assert "2 passed" in said


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_a_filled_library_passes(tmp_path: Path) -> None:
    """What is generated has every call with its arguments, the version, and no mistake of its own."""
    said = prill(tmp_path, "run", *LOOKED_AT, "--engine", library(tmp_path), "--model", MODEL, code=0)
    assert f"{len(LOOKED_AT)} passed" in said


def test_a_filled_architecture_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed with its own declaration, both readings of the guide's architecture agree, in every stage."""
    monkeypatch.setenv("PYTHONPATH", str(adapter(tmp_path)))
    said = prill(tmp_path, "run", "--model", "magpie.gguf", "witness", "stages", code=0)
    assert "the witness magpie_second:forward of prill-magpie 0.1" in said
    assert " failed" not in said


# --- whole gates --------------------------------------------------------------------------------------------


@pytest.mark.engines
@pytest.mark.parametrize(
    ("gate", "made", "lacking"),
    [("boundary", library, 0), ("contract", worker, 1)],
    ids=["library", "worker"],
)
def test_its_own_gate_is_green(gate: str, made: Made, lacking: int, tmp_path: Path) -> None:
    """Every check passes and every item is proven, but for requests at one time, of which a worker takes
    none; what the checks themselves were seen to kill is not asked here."""
    spec, out = made(tmp_path), tmp_path / "out"
    child("gate", gate, "--engine", spec, "--model", MODEL, "--out", str(out), cwd=tmp_path)
    verdict = msgspec.json.decode((out / "verdict.json").read_bytes(), type=Verdict)
    assert {rule.id for rule in verdict.rules if rule.status is not Status.PASSED} <= {"kills"}
    assert {item.status for item in verdict.items} == {ItemStatus.PROVEN}
    assert verdict.counts["lacking"] == lacking
    assert verdict.counts["passed"] == verdict.counts["checks"] - lacking >= 18
