"""environment.yml, pyproject.toml, constraints.txt and the Makefile agree with one another."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
APART = {"colab", "fuzz"}  # outside `all`: what Colab lacks is in the others already; fuzzing is Linux alone


def pins() -> dict[str, Version]:
    found = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            name, version = line.split("==")
            assert canonicalize_name(name) not in found, f"{name} is pinned twice"
            found[canonicalize_name(name)] = Version(version)
    return found


def direct() -> list[tuple[str, Requirement]]:
    groups = {"base": PROJECT["dependencies"], **{n: r for n, r in EXTRAS.items() if n not in APART}}
    return [(group, Requirement(text)) for group, texts in groups.items() for text in texts]


@pytest.mark.parametrize(("group", "requirement"), direct(), ids=lambda value: str(value)[:30])
def test_each_direct_dependency_has_an_exact_pin_within_its_bound(group: str, requirement: Requirement) -> None:
    if requirement.name == PROJECT["name"]:
        assert requirement.extras <= EXTRAS.keys(), f"{group} names extras that do not exist"
        return
    assert requirement.specifier, f"{group}: {requirement.name} has no lower bound"
    pinned = pins().get(canonicalize_name(requirement.name))
    assert pinned is not None, f"add {requirement.name} to constraints.txt"
    assert requirement.specifier.contains(pinned, prereleases=True)


def test_pins_are_exact_sorted_and_free_of_builds() -> None:
    names = list(pins())
    assert names == sorted(names)
    assert all(version.local is None for version in pins().values()), "a +cpu pin shuts out everyone's GPU"
    assert not [name for name in names if name.startswith(("nvidia-", "triton"))], "CUDA came along"


def test_all_takes_in_every_extra_but_those_apart() -> None:
    whole = {extra for text in EXTRAS["all"] for extra in Requirement(text).extras}
    assert whole == EXTRAS.keys() - APART - {"all"}


def test_colab_keeps_what_colab_brings() -> None:
    """A set-up cell that replaces Colab's torch or numpy breaks all that was built against it."""
    listed = {canonicalize_name(Requirement(text).name) for text in EXTRAS["colab"]}
    assert not listed & {"torch", "numpy", "pandas", "ipython", "dsr1kit"}


def test_the_conda_environment_fits_the_project() -> None:
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    environment = yaml.safe_load(text)
    assert environment["name"] == PROJECT["name"]
    assert environment["channels"] == ["conda-forge"]
    plain = dict(re.fullmatch(r"([\w-]+)=?(.*)", d).groups() for d in environment["dependencies"] if isinstance(d, str))
    assert SpecifierSet(PROJECT["requires-python"]).contains(plain["python"] + ".0")
    assert f"Programming Language :: Python :: {plain['python']}" in PROJECT["classifiers"]
    assert "pip" in plain
    (piped,) = (d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert "-c constraints.txt" in piped
    (editable,) = (line for line in piped if line.startswith("-e "))
    assert editable.startswith("-e .[")
    assert set(editable.removeprefix("-e .[").removesuffix("]").split(",")) <= EXTRAS.keys()


def test_every_line_of_the_conda_environment_has_its_reason() -> None:
    for line in (ROOT / "environment.yml").read_text(encoding="utf-8").splitlines():
        bare = line.split("#")[0].strip()
        if bare and not bare.endswith(":"):
            assert re.search(r"  # \w.{10,}", line), f"no reason beside: {line}"


def test_tested_pythons_are_those_the_package_claims() -> None:
    claimed = {c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)}
    workflow = (ROOT / ".github" / "workflows" / "notebooks.yml").read_text(encoding="utf-8")
    assert set(re.findall(r'"(3\.\d+)"', workflow)) == claimed


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Inside `make test`, make's own variables would carry its options into this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["help", "run", "test", "lint"])
def test_the_makefile_knows_its_targets(target: str) -> None:
    ran = make("--dry-run", target)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_torch_comes_from_the_index_that_is_asked_for() -> None:
    index = "https://torch.example/cpu"
    told = make("--dry-run", "--always-make", "run", f"TORCH_INDEX={index}", "PYTHON=python3").stdout
    assert f"--extra-index-url {index}" in told
    assert "-c constraints.txt -e '.[local,notebooks]'" in told
