"""A build hook: source archives and wheels know the commit they were built from."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "harness/prill_harness"


class StampCommit(BuildHookInterface[Any]):
    """Adds `prill_harness/commit.txt`; an editable install asks git instead, because its commit changes."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        package = Path(self.root) / PACKAGE
        spec = importlib.util.spec_from_file_location("prill_version", package / "version.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if version == "editable" or (package / module.STAMP).exists():  # a source archive has one already
            return
        stamp = Path(tempfile.mkdtemp()) / module.STAMP
        stamp.write_text(module.commit(package) + "\n", encoding="ascii")
        inside = PACKAGE if self.target_name == "sdist" else Path(PACKAGE).name
        build_data["force_include"][str(stamp)] = f"{inside}/{module.STAMP}"
