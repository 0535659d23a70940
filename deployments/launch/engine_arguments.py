"""Check the keys of `engine:` against vLLM's source, because importing vLLM takes 6 s.

A misspelt key is thus an error before anything starts, and not a line in a replica's log.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from calm_serve.config import Fleet
from calm_serve.errors import ConfigError

_SOURCES = {
    "engine/arg_utils.py": ("EngineArgs", "AsyncEngineArgs"),
    "entrypoints/launchers/cli_args.py": ("BaseFrontendArgs", "FrontendArgs"),
}


@cache
def known_arguments() -> frozenset[str]:
    """Return fields of vLLM's engine and frontend arguments; empty when vLLM is not installed."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return frozenset()
    root = Path(spec.origin).parent
    return frozenset(
        name for file, classes in _SOURCES.items() for name in _fields(root / file, classes)
    )


def check_engine_arguments(fleet: Fleet) -> None:
    """Raise ConfigError for an `engine` key that vLLM does not have."""
    known = known_arguments()
    for slm in fleet.slms:
        for key in slm.engine if known else ():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
                raise ConfigError(
                    f"SLM {slm.id!r}: vLLM has no engine argument {key!r}; the nearest is {near!r}"
                )


def _fields(path: Path, classes: tuple[str, ...]) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in classes:
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    yield item.target.id
