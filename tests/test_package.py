"""The package as a whole: cheap to import, its names there, its rooms in order."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import dsr1kit

PACKAGE = Path(dsr1kit.__file__).parent
#: Lower rooms never import higher ones. A module that is not named here speaks words for everyone: rank 0.
ROOMS = (
    ("access",), ("local",), ("emulator", "about"), ("backends",), ("compare",), ("finetune",),
    ("notebook_engine", "notebook_parameters", "notebooks"), ("commands", "doctoring", "cli", "__main__"),
)  # fmt: skip
RANK = {room: rank for rank, rooms in enumerate(ROOMS, 1) for room in rooms}


def fresh(code: str) -> str:
    """What the code prints in an interpreter that has imported nothing yet."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def test_importing_the_package_is_cheap_and_pulls_in_nothing_heavy() -> None:
    code = (
        "import time, sys, json; began = time.process_time(); import dsr1kit\n"
        "print(json.dumps([time.process_time() - began, sorted(sys.modules)]))"
    )
    times = []
    for _ in range(5):
        spent, modules = json.loads(fresh(code))
        times.append(spent)
        heavy = {"torch", "transformers", "pandas", "matplotlib", "aiohttp", "numpy", "scipy"}
        assert not heavy & set(modules)
    assert min(times) < 0.1


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("dsr1kit.access.client", ("torch", "transformers", "pandas", "matplotlib", "aiohttp")),
        ("dsr1kit.compare.runner", ("torch", "transformers", "matplotlib.pyplot")),
        ("dsr1kit.cli", ("torch", "transformers", "pandas", "matplotlib", "aiohttp", "scipy")),
        ("dsr1kit.local.model", ("torch", "transformers")),
        ("dsr1kit.emulator.server", ("torch", "transformers")),
    ],
)
def test_a_room_can_be_entered_without_what_only_some_of_it_needs(module: str, absent: tuple[str, ...]) -> None:
    modules = json.loads(fresh(f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"))
    assert not set(absent) & set(modules)


def test_all_names_are_sorted_and_there() -> None:
    assert dsr1kit.__all__ == sorted(dsr1kit.__all__, key=lambda n: (not n.isupper(), n))
    assert len(set(dsr1kit.__all__)) == len(dsr1kit.__all__)
    for name in dsr1kit.__all__:
        assert getattr(dsr1kit, name) is not None
    assert set(dsr1kit.__all__) <= set(dir(dsr1kit))


def test_the_version_is_the_installed_one_and_other_names_are_attribute_errors() -> None:
    assert dsr1kit.__version__ == importlib.metadata.version("dsr1kit")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = dsr1kit.nonsense


def rank_of(module: str) -> int:
    room = module.removeprefix("dsr1kit").lstrip(".").partition(".")[0]
    return RANK.get(room, 0)


def imported(tree: ast.Module) -> set[str]:
    """The kit's modules that a module imports when it is imported itself."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            # `from dsr1kit import x` and `from dsr1kit.room import x`: x may be the module.
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return {name for name in found if name.startswith("dsr1kit.")}


@pytest.mark.parametrize(
    "path", [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"], ids=lambda p: p.name
)
def test_no_room_imports_a_higher_one(path: Path) -> None:
    module = ".".join(["dsr1kit", *path.relative_to(PACKAGE).with_suffix("").parts])
    for other in imported(ast.parse(path.read_text(encoding="utf-8"))):
        assert rank_of(other) <= rank_of(module), f"{module} imports {other}"
