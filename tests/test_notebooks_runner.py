"""The notebook runner: what counts as well, which parameters pass, limits that hold, nothing unredacted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from dsr1kit.errors import ConfigError, NotebookFailed, UnknownName, UsageError
from dsr1kit.notebooks import (
    NotebookRun,
    check_parameters,
    find_notebook,
    list_parameters,
    notebook_settings,
    publish,
    run_notebook,
)

PARAMETERS = """\
from typing import Optional
items: int = 3  # how many questions
rate: float = 0.5  # requests a second
loud: bool = False  # print more
title: str = "plain"  # heading
seed: Optional[int] = None  # none: random
cap: float | None = None  # seconds
plain = 7
word = "x"  # a plain one with help
nothing = None
table = {"a": 1}
"""
SECRET = "correct-horse-battery-staple-42"  # noqa: S105 - a made-up value that must not leak


def notebook(folder: Path, *cells: str, parameters: str | None = None, name: str = "small.ipynb") -> Path:
    nb = new_notebook(metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "p"}})
    nb.cells.append(new_markdown_cell("# A small notebook", id="title"))
    if parameters is not None:
        nb.cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}, id="params"))
    nb.cells += [new_code_cell(textwrap.dedent(cell), id=f"c{number}") for number, cell in enumerate(cells)]
    path = folder / name
    nbformat.write(nb, path)
    return path


def run(folder: Path, *cells: str, parameters: str | None = None, **kwargs: object) -> NotebookRun:
    values = kwargs.pop("values", None)
    return run_notebook(notebook(folder, *cells, parameters=parameters), values, out_dir=folder / "out", **kwargs)


def everything_under(folder: Path) -> str:
    return "\n".join(p.read_text(encoding="utf-8") for p in sorted(folder.rglob("*")) if p.is_file())


def test_a_good_run_leaves_copy_and_sidecar(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    ended = run(
        tmp_path,
        "print(items + 1, rate, repr(title))",
        "1 + 1",
        parameters=PARAMETERS,
        values={"items": "41", "rate": "2", "title": "it's {braces}"},
        on_progress=lambda *told: seen.append(told),
    )
    assert (ended.status, ended.error, ended.failing_cell) == ("ok", "", None)
    assert ended.raise_for_status() is ended
    copy = nbformat.read(ended.executed, as_version=4)
    nbformat.validate(copy)
    assert copy.cells[3].outputs[0].text == '42 2.0 "it\'s {braces}"\n'
    assert [number for number, _, _ in seen] == [1, 2, 3, 4]
    assert seen[2] == (3, 4, "print(items + 1, rate, repr(title))")

    told = json.loads(ended.sidecar.read_text(encoding="utf-8"))
    assert ended.sidecar.name == "small.run.json"
    assert told["status"] == "ok"
    assert told["error"] is None
    assert told["parameters"]["items"] == 41
    assert told["parameters"]["loud"] is False, "defaults count as parameters of the run"
    assert told["started_at"].endswith("+00:00")
    assert told["started_at"] < told["finished_at"]
    assert [cell["status"] for cell in told["cells"]] == ["completed"] * 4
    assert all(cell["seconds"] >= 0 for cell in told["cells"])
    assert told["versions"].keys() >= {"python", "dsr1kit", "papermill"}
    assert told["hardware"]["cores"] >= 1
    assert told["hardware"]["ram_bytes"] > 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["small.ipynb", "small.run.json"]


@pytest.mark.parametrize(
    ("cells", "where", "error"),
    [
        pytest.param(["1 / 0", "2"], "c0", "ZeroDivisionError", id="error"),
        pytest.param(["1", "import os; os._exit(0)", "2"], "c1", "kernel died", id="dead-kernel"),
        pytest.param(["import sys; sys.exit(0)", "2"], "c0", "sys.exit", id="sys-exit-0"),
        pytest.param(["1", "import sys\nsys.exit()"], "c1", "sys.exit", id="sys-exit-in-the-last-cell"),
        pytest.param(["import sys; sys.exit('no model')", "2"], "c0", "sys.exit", id="sys-exit-word"),
        pytest.param(["raise SystemExit(3)"], "c0", "sys.exit", id="system-exit"),
        pytest.param(["1", "exit()", "2"], "c1", "exit", id="ipython-exit"),
        pytest.param(["input('key? ')"], "c0", "StdinNotImplementedError", id="asks-the-person"),
    ],
)
def test_whatever_does_not_run_to_its_end_is_a_failure(
    tmp_path: Path, cells: list[str], where: str, error: str
) -> None:
    ended = run(tmp_path, *cells)
    assert ended.status == "failed"
    assert error in ended.error
    assert ended.failing_cell is not None
    assert ended.failing_cell.id == where
    assert ended.failing_cell.index == int(where[1:]) + 1
    first_line = cells[int(where[1:])].splitlines()[0]
    assert ended.failing_cell.first_line == first_line
    assert first_line in ended.error
    assert nbformat.read(ended.executed, as_version=4).cells, "the copy is kept"
    told = json.loads(ended.sidecar.read_text(encoding="utf-8"))
    assert (told["status"], told["failing_cell"]["id"]) == ("failed", ended.failing_cell.id)
    with pytest.raises(NotebookFailed, match=r"small\.ipynb"):
        ended.raise_for_status()


def test_a_cell_tagged_to_be_skipped_runs_all_the_same(tmp_path: Path) -> None:
    path = notebook(tmp_path, "print('ran')")
    nb = nbformat.read(path, as_version=4)
    nb.cells[1].metadata["tags"] = ["skip-execution"]
    nbformat.write(nb, path)
    ended = run_notebook(path, out_dir=tmp_path / "out")
    assert ended.status == "ok"
    assert nbformat.read(ended.executed, as_version=4).cells[1].outputs[0].text == "ran\n"


def test_a_cell_over_its_limit_is_killed_and_named(tmp_path: Path) -> None:
    began = time.monotonic()
    ended = run(tmp_path, "print('before', flush=True)", "while True: pass", "3", cell_timeout_s=3)
    assert time.monotonic() - began < 30
    assert ended.status == "timeout"
    assert "limit of 3 s" in ended.error
    assert ended.failing_cell is not None
    assert ended.failing_cell.id == "c1"
    assert "before" in ended.executed.read_text(encoding="utf-8")


def test_the_limit_of_the_whole_kills_kernel_and_children_in_the_middle_of_a_cell(tmp_path: Path) -> None:
    cells = [
        f"""
        import os, pathlib, signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        pathlib.Path({str(tmp_path / "pids")!r}).write_text(f"{{os.getpid()}} {{child.pid}}")
        """,
        "time.sleep(600)",
    ]
    ended = run(tmp_path, *cells, total_timeout_s=6)
    assert ended.status == "timeout"
    assert "the whole" in ended.error
    assert 5 < ended.seconds < 30
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        with pytest.raises(ProcessLookupError):
            # A killed child of a process that is gone may be a zombie until init collects it.
            os.kill(pid, 0) if _state(pid) != "Z" else os.kill(2**22 + 1, 0)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "Z"


@pytest.mark.parametrize("limit", [0, -1, float("nan")])
def test_a_limit_that_is_no_limit_is_refused(tmp_path: Path, limit: float) -> None:
    with pytest.raises(UsageError, match="cell_timeout_s"):
        run(tmp_path, "1", cell_timeout_s=limit)


def test_a_misspelled_parameter_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"'itmes'; did you mean 'items'\?"):
        run(tmp_path, "1", parameters=PARAMETERS, values={"itmes": "3"})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("items", "12", 12),
        ("items", 12, 12),
        ("items", "-1", -1),
        ("rate", "1e-3", 0.001),
        ("rate", 3, 3.0),
        ("loud", "True", True),
        ("loud", "false", False),
        ("title", "none", "none"),
        ("title", "12", "12"),
        ("title", "", ""),
        ("seed", "none", None),
        ("seed", "5", 5),
        ("seed", None, None),
        ("cap", "2.5", 2.5),
        ("cap", "None", None),
        ("plain", "8", 8),
        ("word", "y", "y"),
        ("nothing", "something", "something"),
        ("nothing", "none", None),
    ],
)
def test_values_take_the_declared_type(tmp_path: Path, name: str, given: object, expected: object) -> None:
    path = notebook(tmp_path, parameters=PARAMETERS)
    value = check_parameters(path, {name: given})[name]
    assert (value, type(value)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("items", "3.5", "a whole number"),
        ("items", "many", "a whole number"),
        ("items", True, "a whole number"),
        ("items", 3.0, "a whole number"),
        ("items", "none", "a whole number"),
        ("rate", "nan", "a finite number"),
        ("rate", "inf", "a finite number"),
        ("rate", "fast", "a finite number"),
        ("loud", "1", "true or false"),
        ("loud", 1, "true or false"),
        ("title", 12, "a text"),
        ("seed", "1.5", "a whole number or none"),
        ("cap", "x", "a finite number or none"),
        ("plain", "7.5", "a whole number"),
        ("table", "{}", "cannot be set from outside"),
    ],
)
def test_wrong_types_are_told_with_notebook_parameter_type_and_value(
    tmp_path: Path, name: str, given: object, wanted: str
) -> None:
    path = notebook(tmp_path, parameters=PARAMETERS)
    with pytest.raises(UsageError) as caught:
        check_parameters(path, {name: given})
    message = str(caught.value)
    assert "small" in message
    assert repr(name) in message
    assert wanted in message
    assert repr(given) in message or name == "table"


def test_parameters_are_listed_with_type_default_and_help(tmp_path: Path) -> None:
    found = {p.name: p for p in list_parameters(notebook(tmp_path, parameters=PARAMETERS))}
    assert list(found)[:3] == ["items", "rate", "loud"]
    assert (found["items"].annotation, found["items"].default, found["items"].help) == (
        "int",
        3,
        "how many questions",
    )
    assert (found["seed"].annotation, found["seed"].default) == ("Optional[int]", None)
    assert (found["cap"].annotation, found["plain"].annotation) == ("float | None", "int")


def test_parameters_need_exactly_one_cell_for_them(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="0 cells"):
        run(tmp_path, "1", values={"items": "3"})
    path = notebook(tmp_path, parameters="items = 3")
    nb = nbformat.read(path, as_version=4)
    nb.cells.append(new_code_cell("other = 3", metadata={"tags": ["parameters"]}))
    nbformat.write(nb, path)
    with pytest.raises(UsageError, match="2 cells"):
        run_notebook(path, {"items": "3"}, out_dir=tmp_path / "out")


def test_magics_in_the_parameters_cell_are_named_as_the_cause(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not plain Python"):
        list_parameters(notebook(tmp_path, parameters="%pip install x\nitems = 3"))


def test_a_notebook_with_an_out_dir_gets_the_runs_folder(tmp_path: Path) -> None:
    ended = run(tmp_path, "print(out_dir)", parameters='out_dir: str = "elsewhere"  # results')
    assert str(tmp_path / "out") in ended.executed.read_text(encoding="utf-8")
    told = run(tmp_path, "print('at', out_dir)", parameters='out_dir: str = ""', values={"out_dir": "there"})
    assert "at there" in told.executed.read_text(encoding="utf-8")


def test_relative_paths_mean_the_callers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    path = notebook(tmp_path / "deep", "import os; print(os.getcwd())")
    monkeypatch.chdir(tmp_path)
    ended = run_notebook(path, out_dir="out")
    assert nbformat.read(ended.executed, as_version=4).cells[1].outputs[0].text == f"{tmp_path}\n"


def test_keys_are_redacted_wherever_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_LAB_API_KEY", SECRET)
    shaped = "sk-" + "a1b2c3d4" * 4
    ended = run(
        tmp_path,
        f"""
        import os, sys
        from IPython.display import HTML, display
        key = os.environ["SOME_LAB_API_KEY"]
        print("mine:", key)
        print("shaped:", {shaped!r}, "Bearer", "hf_" + "Zz9" * 12)
        sys.stdout.write(key[:7]); sys.stdout.flush()
        import time; time.sleep(0.5)
        sys.stdout.write(key[7:]); sys.stdout.flush()
        display(HTML(f"<b>{{key}}</b>"), metadata={{"note": key}})
        """,
        "key",
        "raise ValueError(f'refused: {key}')",
        parameters='api_key: str = ""  # yours\nnote: str = ""',
        values={"api_key": 'it\'s my "own" pass-phrase', "note": SECRET},
    )
    assert ended.status == "failed"
    assert "refused: [redacted]" in ended.error
    left = everything_under(tmp_path / "out") + repr(ended)
    for secret in (SECRET, shaped, "Zz9Zz9", "pass-phrase", SECRET[7:]):
        assert secret not in left
    told = json.loads(ended.sidecar.read_text(encoding="utf-8"))
    assert told["parameters"] == {"api_key": "[redacted]", "note": "[redacted]"}
    assert "[redacted]" in ended.executed.read_text(encoding="utf-8")


def test_a_key_in_a_coloured_traceback_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_LAB_TOKEN", "alpha-beta.gamma-delta")
    ended = run(
        tmp_path,
        "import os; a, b = os.environ['SOME_LAB_TOKEN'].split('.')",
        "raise ValueError(f'at \\x1b[31m{a}.\\x1b[0m{b}')",
    )
    assert "gamma-delta" not in everything_under(tmp_path / "out")
    assert ended.status == "failed"


def test_a_runner_killed_in_the_middle_leaves_only_redacted_files_and_no_old_result(tmp_path: Path) -> None:
    path = notebook(tmp_path, "import os; print(os.environ['LAB_SECRET'])", "import time; time.sleep(600)")
    out = tmp_path / "out"
    out.mkdir()
    (out / "small.run.json").write_text('{"status": "ok"}')
    code = f"from dsr1kit.notebooks import run_notebook; run_notebook({str(path)!r}, out_dir={str(out)!r})"
    environment = os.environ | {"LAB_SECRET": SECRET, "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    runner = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            copy = out / "small.ipynb"
            if copy.exists() and "[redacted]" in copy.read_text(encoding="utf-8"):
                break
            time.sleep(0.1)
        else:
            pytest.fail("no redacted copy was published while the notebook ran")
    finally:
        runner.kill()
        runner.wait()
    left = everything_under(out) + everything_under(tmp_path / "tmp")
    assert SECRET not in left
    assert not (out / "small.run.json").exists()


def test_results_reach_the_runner_with_paths_made_portable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = run(
        tmp_path,
        """
        from pathlib import Path
        from dsr1kit.notebooks import publish
        files = [str(Path.cwd() / "a.jsonl")]
        publish(report=Path.cwd() / "out" / "report.html", files=files, verdict="early")
        """,
        "publish(verdict='no difference', accuracy=0.5)",
    )
    assert ended.results == {
        "report": "out/report.html",
        "files": ["a.jsonl"],
        "verdict": "no difference",
        "accuracy": 0.5,
    }
    assert json.loads(ended.sidecar.read_text(encoding="utf-8"))["results"] == ended.results
    outputs = nbformat.read(ended.executed, as_version=4).cells[1].outputs
    assert "report: out/report.html" in outputs[0].data["text/plain"]


@pytest.mark.parametrize("value", [object(), float("nan"), "x" * 70_000])
def test_publish_refuses_what_is_not_small_json(value: object) -> None:
    with pytest.raises(UsageError, match="publish"):
        publish(value=value)


def test_unknown_notebooks_are_told_with_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook(tmp_path, name="30_hosted_vs_local.ipynb")
    monkeypatch.setattr("dsr1kit.notebook_parameters.notebooks_dir", lambda: tmp_path)
    assert find_notebook("30_hosted_vs_local") == tmp_path / "30_hosted_vs_local.ipynb"
    assert find_notebook("30_hosted_vs_local.ipynb") == tmp_path / "30_hosted_vs_local.ipynb"
    with pytest.raises(UnknownName, match="did you mean '30_hosted_vs_local'"):
        find_notebook("30_hosted_vs_locl")


def test_a_file_that_is_no_notebook_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "odd.ipynb").write_text("not JSON")
    with pytest.raises(UsageError, match="not a readable notebook"):
        run_notebook(tmp_path / "odd.ipynb", out_dir=tmp_path / "out")


def test_the_copy_never_replaces_the_notebook_itself(tmp_path: Path) -> None:
    path = notebook(tmp_path, "1")
    before = path.read_bytes()
    with pytest.raises(UsageError, match="itself"):
        run_notebook(path, out_dir=tmp_path)
    assert path.read_bytes() == before


def test_what_the_kernel_prints_below_python_stays_off_stdout(tmp_path: Path) -> None:
    path = notebook(tmp_path, "import os; os.system('echo from-a-child')")
    code = f"from dsr1kit.notebooks import run_notebook; run_notebook({str(path)!r}, out_dir='out')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert ran.stdout == ""


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[1, 2]", "must be a mapping"),
        ("a: {timeout_s: {cell: 1, total: 2}}", "test_parameters"),
        ("a: {timeout_s: {cell: 1, total: 2}, test_parameters: {}, tset: 1}", "tset"),
        ("a: {timeout_s: {cell: fast, total: 2}, test_parameters: {}}", "a.timeout_s.cell"),
        ("a: {timeout_s: {cell: 0, total: 2}, test_parameters: {}}", "a.timeout_s.cell"),
        ("a: {timeout_s: {cell: 1}, test_parameters: {}}", "total"),
        ("a: {timeout_s: {cell: 1, total: 2}, test_parameters: {x: [1]}}", "a.test_parameters.x"),
        ("a: {", "YAML"),
    ],
)
def test_settings_are_read_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, complaint: str) -> None:
    (tmp_path / "notebooks.yaml").write_text(text)
    monkeypatch.setattr("dsr1kit.notebooks.data_dir", lambda: tmp_path)
    with pytest.raises(ConfigError, match=complaint) as caught:
        notebook_settings()
    assert "notebooks.yaml" in str(caught.value)


def test_the_shipped_settings_read_well() -> None:
    settings = notebook_settings()
    assert settings["30_hosted_vs_local"].total_timeout_s >= settings["30_hosted_vs_local"].cell_timeout_s > 0
