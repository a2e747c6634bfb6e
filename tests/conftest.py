"""What several test files need: no catalogue of the person who runs them, and an own one of a few lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from weights_of import smollm2_gguf

from dsr1kit.access.channels import Catalogue, load_channels


@pytest.fixture(autouse=True)
def _no_own_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSR1KIT_CHANNELS", raising=False)


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], Catalogue]:
    """The shipped catalogue with the given text over it."""

    def write_and_load(text: str) -> Catalogue:
        path = tmp_path / "my.toml"
        path.write_text(text, encoding="utf-8")
        return load_channels(path)

    return write_and_load


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, a GGUF; for slow tests."""
    return smollm2_gguf(tmp_path_factory.mktemp("smollm2"))
