"""What must hold of every notebook without running it; each test tells the incident that it prevents."""

from __future__ import annotations

import ast
import json
import re
import statistics
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from dsr1kit.keys import redact
from dsr1kit.notebooks import check_parameters, list_parameters, notebook_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ABSOLUTE = re.compile(
    r"(?<![\w.:/~<>-])/(?:home|root|Users|tmp|var|opt|mnt|media|srv|private|scratch|data|work|workspace|content)/"
    r"|\b[A-Z]:\\\\?\w"
)
INSTALL = re.compile(r"\bpip\d?[\"', ]+install\b")
GUARD = '"google.colab" in sys.modules'

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def texts(value: Any, key: str = "") -> Iterator[str]:
    """All texts in a notebook but those that hold pictures."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from texts(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner, key)
    elif isinstance(value, str) and not key.startswith("image/"):
        yield value


def trees(path: Path) -> list[ast.Module]:
    """Each code cell's syntax tree, magics turned into calls."""
    transform = TransformerManager().transform_cell
    return [ast.parse(transform(cell.source)) for cell in code_cells(path)]


def repository() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["urls"]["Repository"])


def test_name_is_lowercase(path: Path) -> None:
    """A notebook named `Quickstart.ipynb` opened on macOS and was not found on Linux."""
    assert re.fullmatch(r"\d\d_[a-z0-9_]+\.ipynb", path.name)


def test_format_is_4_5_with_unique_ids_in_the_file(path: Path) -> None:
    """Without ids in the file every save invents new ones, and each diff touches all cells."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert (raw["nbformat"], raw["nbformat_minor"]) == (4, 5)
    ids = [cell.get("id") for cell in raw["cells"]]
    assert all(ids)
    assert len(set(ids)) == len(ids)
    nbformat.validate(read(path))


def test_kernel_is_the_one_every_machine_has(path: Path) -> None:
    """A notebook saved from a private environment asked everyone for a kernel named after it."""
    assert read(path).metadata.kernelspec.name == "python3"


def test_one_parameters_cell_of_scalars_with_help(path: Path) -> None:
    """papermill overlooked `x: int | None = 3` and lists; a run then used defaults and said nothing."""
    cell = [c for c in code_cells(path) if "parameters" in c.metadata.get("tags", [])]
    assert len(cell) == 1
    for node in ast.parse(cell[0].source).body:
        if not isinstance(node, ast.ImportFrom):  # Optional
            assert isinstance(node, ast.AnnAssign), f"write `name: type = value  # help`: {ast.unparse(node)}"
    declared = list_parameters(path)
    assert declared
    for parameter in declared:
        assert "|" not in parameter.annotation, f"{parameter.name}: write Optional[...]"
        assert re.fullmatch(r"(Optional\[)?(int|float|bool|str)\]?", parameter.annotation), parameter
        assert parameter.help, f"{parameter.name} has no help comment on its line"


def test_settings_name_it_with_parameters_that_exist(path: Path) -> None:
    """A renamed parameter left the test passing the old name, and the full run went unnoticed for hours."""
    settings = notebook_settings()
    assert path.stem in settings, f"add {path.stem} to data/notebooks.yaml"
    check_parameters(path, settings[path.stem].test_parameters)


def test_settings_name_no_notebook_that_is_gone(path: Path) -> None:
    """A notebook was renamed and its limits stayed behind under the old name."""
    assert set(notebook_settings()) <= {other.stem for other in NOTEBOOKS}


def test_badge_opens_this_notebook_of_this_repository(path: Path) -> None:
    """A copied badge opened another notebook in Colab, and after a move the badge of a fork."""
    first = next(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    name = repository().removeprefix("https://github.com/")
    assert f"https://colab.research.google.com/github/{name}/blob/main/notebooks/{path.name}" in first
    for text in texts(read(path)):
        for other in re.findall(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/", text):
            assert other == name
        for other in re.findall(r"git\+(https://github\.com/[\w.-]+/[\w.-]+?)(?:\.git)?(?=[@#\"'\s]|$)", text):
            assert other == repository()


def test_colab_starts_with_a_gpu(path: Path) -> None:
    """On Colab's default CPU runtime people waited an hour for what a free T4 does in two minutes."""
    metadata = read(path).metadata
    assert metadata.get("accelerator") == "GPU"
    assert metadata.get("colab", {}).get("gpuType") == "T4"


def test_set_up_installs_on_colab_alone_and_keeps_its_torch(path: Path) -> None:
    """A set-up cell replaced Colab's torch by another build, and everything compiled against it broke."""
    guarded = [cell.source for cell in code_cells(path) if GUARD in cell.source]
    assert len(guarded) == 1, f"one set-up cell with `if {GUARD}:`"
    for cell in code_cells(path):
        guard_indent: int | None = None
        for line in cell.source.splitlines():
            indent = len(line) - len(line.lstrip())
            if GUARD in line:
                guard_indent = indent
            elif INSTALL.search(line) and not line.lstrip().startswith("#"):
                assert guard_indent is not None, f"installs outside Colab: {line}"
                assert indent > guard_indent, f"installs outside Colab: {line}"
                assert not re.search(r"(?<![\w-])(torch|numpy|pandas|ipython)\b", line), line
            elif line.strip() and guard_indent is not None and indent <= guard_indent:
                guard_indent = None


def test_no_folder_of_a_machine_is_in_it(path: Path) -> None:
    """Saved outputs showed the author's home folder, and a cell read a file that only existed there."""
    for text in texts(read(path)):
        found = ABSOLUTE.search(text)
        assert found is None, f"absolute path: {text[max(0, found.start() - 40) : found.end() + 40]!r}"


def test_no_key_is_in_it(path: Path) -> None:
    """A printed request header carried a live key into the repository's history."""
    for text in texts(read(path)):
        assert redact(text) == text


def test_no_widget_state_is_saved(path: Path) -> None:
    """Widget state without its version made the notebook unreadable on the code host, and added megabytes."""
    assert "widgets" not in read(path).metadata
    for cell in code_cells(path):
        for output in cell.outputs:
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


def test_saved_from_one_run_from_top_to_bottom(path: Path) -> None:
    """Cells run out of order showed a result that a fresh run could not reach."""
    counts = [cell.execution_count for cell in code_cells(path) if cell.source.strip()]
    assert counts == list(range(1, len(counts) + 1))
    assert all(cell.source.strip() for cell in code_cells(path)), "an empty code cell"


def test_saved_without_error_or_stderr(path: Path) -> None:
    """A saved warning named a file of the author's environment; a saved error was taken for the lesson."""
    for cell in code_cells(path):
        for output in cell.outputs:
            assert output.output_type != "error", cell.id
            assert output.get("name") != "stderr", (cell.id, output.text[:200])


def test_not_saved_by_the_runner(path: Path) -> None:
    """A copy executed with test parameters was committed in place of the notebook."""
    assert "papermill" not in read(path).metadata
    assert not [c for c in code_cells(path) if "injected-parameters" in c.metadata.get("tags", [])]


def test_some_outputs_are_held_to_what_is_saved(path: Path) -> None:
    """A changed verdict passed every test, because no test compared a single output."""
    marked = [cell for cell in code_cells(path) if "# NBVAL_CHECK_OUTPUT" in cell.source]
    assert len(marked) >= 3
    assert all(cell.outputs for cell in marked), "a cell without output holds nothing"


def test_it_asserts_what_it_claims(path: Path) -> None:
    """The text said 'faster' while the table below it, from a later run, said slower."""
    assert any(isinstance(node, ast.Assert) for tree in trees(path) for node in ast.walk(tree))


def test_code_cells_are_short(path: Path) -> None:
    """Sixty-line cells hid the one line that mattered, and nobody could rerun a part."""
    lines = [len(cell.source.strip().splitlines()) for cell in code_cells(path)]
    assert statistics.median(lines) <= 8
