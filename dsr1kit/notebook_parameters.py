"""Find a notebook, read what its `parameters` cell declares, and check the values it is given.

The cell is read with `ast`, so annotated and plain assignments both count (papermill's own inference misses
`Optional[str]` and unions, and only warns about a misspelled name). Runs nothing.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import math
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsr1kit.errors import MissingExtra, UnknownName, UsageError
from dsr1kit.keys import redact
from dsr1kit.paths import notebooks_dir

if TYPE_CHECKING:
    from collections.abc import Mapping

Scalar = str | int | float | bool | None

_TYPES = ("int", "float", "bool", "str")
_WANTED = {"int": "a whole number", "float": "a finite number", "bool": "true or false", "str": "a text"}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One assignment of a notebook's `parameters` cell.

    Attributes:
        annotation: as written, or the name of the default's type; empty where neither tells.
        default: the literal assigned; None also where it is not a literal.
        help: the comment at the end of the line.
    """

    name: str
    annotation: str
    default: Any
    help: str


def find_notebook(notebook: str | Path) -> Path:
    """The file meant: a path, or the name of a shipped notebook; raises UnknownName with the nearest."""
    for path in (Path(notebook), Path(f"{notebook}.ipynb")):
        if path.suffix == ".ipynb" and path.is_file():
            return path
    shipped = {path.stem: path for path in notebooks_dir().glob("*.ipynb")}
    if (name := str(notebook).removesuffix(".ipynb")) in shipped:
        return shipped[name]
    raise UnknownName(
        "notebook", str(notebook), shipped, hint="(a path to an .ipynb file, or the name of a shipped one)"
    )


def list_parameters(notebook: str | Path) -> list[Parameter]:
    """The parameters a notebook declares, in order.

    Raises:
        UsageError: there is no cell tagged `parameters`, there are several, or it is not plain Python.
    """
    path = find_notebook(notebook)
    return parameters_of(read_notebook(path), path)


def read_notebook(path: Path) -> Any:
    """The notebook as nbformat 4.5; raises UsageError where the file is no notebook."""
    if importlib.util.find_spec("papermill") is None or importlib.util.find_spec("nbformat") is None:
        raise MissingExtra("running notebooks", "notebooks", "papermill")
    import nbformat

    try:
        nb = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)  # type: ignore[no-untyped-call]  # theirs
        return nbformat.v4.upgrade(nb)  # type: ignore[no-untyped-call]  # theirs
    except Exception as error:  # nbformat raises several unrelated classes
        raise UsageError(f"{path}: not a readable notebook: {error!s:.200}") from None


def parameters_cells(nb: Any) -> list[Any]:
    """The code cells tagged `parameters`; a runnable notebook has one."""
    return [c for c in nb.cells if c.cell_type == "code" and "parameters" in c.metadata.get("tags", [])]


def parameters_of(nb: Any, path: Path) -> list[Parameter]:
    """The declared parameters, in order; raises UsageError without a single readable `parameters` cell."""
    cells = parameters_cells(nb)
    if len(cells) != 1:
        raise UsageError(
            f"{path.name}: {len(cells)} cells are tagged `parameters`, parameters need exactly one; "
            "tag the cell that assigns the defaults"
        )
    source: str = cells[0].source
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise UsageError(f"{path.name}: its parameters cell is not plain Python: {error}") from None
    comments = {
        token.start[0]: token.string.lstrip("# ").rstrip()
        for token in tokenize.generate_tokens(io.StringIO(source + "\n").readline)
        if token.type == tokenize.COMMENT
    }
    found: dict[str, Parameter] = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        try:
            default = ast.literal_eval(node.value)
            annotation = "Optional[str]" if default is None else type(default).__name__
        except (ValueError, TypeError):
            default, annotation = None, ""
        if isinstance(node, ast.AnnAssign):
            annotation = ast.unparse(node.annotation).strip("'\"")
        help_ = comments.get(node.end_lineno or node.lineno, "")
        found |= {t.id: Parameter(t.id, annotation, default, help_) for t in targets if isinstance(t, ast.Name)}
    return list(found.values())


def kinds_of(annotation: str) -> set[str]:
    """The scalar types an annotation allows, `None` among them; empty where it allows anything else."""
    inner = re.sub(r"\btyping\.", "", annotation).replace(" ", "")
    if match := re.fullmatch(r"Optional\[(.+)\]", inner):
        inner = f"{match[1]}|None"
    elif match := re.fullmatch(r"Union\[(.+)\]", inner):
        inner = match[1].replace(",", "|")
    kinds = set(inner.split("|"))
    return kinds if kinds <= {*_TYPES, "None"} else set()


def _convert(notebook: str, parameter: Parameter, value: object) -> Scalar:
    """`value`, from the command line or a file, as the type the parameter declares.

    Texts are read as the type asks: `true`/`false`, whole and finite numbers, `none` for optionals.

    Raises:
        UsageError: naming notebook, parameter, expected type and value.
    """
    kinds = kinds_of(parameter.annotation)
    where = f"{notebook}: parameter {parameter.name!r}"
    if not kinds:
        told = f"is of type {parameter.annotation}" if parameter.annotation else "has no type"
        raise UsageError(f"{where} {told} and cannot be set from outside; scalars alone can (name: int = 3)")
    text = value.strip().lower() if isinstance(value, str) else None
    if "None" in kinds and (value is None or text in ("none", "null")):
        return None
    for kind in ("bool", "int", "float", "str"):  # the narrowest reading first
        if kind not in kinds:
            continue
        if kind == "str" and isinstance(value, str):
            return value
        if kind == "bool" and (isinstance(value, bool) or text in ("true", "false")):
            return text == "true" if text is not None else bool(value)
        if isinstance(value, bool):
            continue
        with contextlib.suppress(ValueError, OverflowError):
            if kind == "int" and (text is not None or isinstance(value, int)):
                return int(value)  # type: ignore[call-overload, no-any-return]  # a str or an int by now
            if kind == "float" and (text is not None or isinstance(value, int | float)):
                number = float(value)  # type: ignore[arg-type]  # a str or a number by now
                if math.isfinite(number):
                    return number
    wanted = " or ".join(_WANTED[k] for k in _TYPES if k in kinds) + (" or none" if "None" in kinds else "")
    raise UsageError(f"{where} takes {wanted} ({parameter.annotation}), not {redact(repr(value))}")


def check_parameters(notebook: str | Path, values: Mapping[str, object]) -> dict[str, Scalar]:
    """`values` converted to the types the notebook declares.

    Raises:
        UnknownName: a name the notebook does not declare, told with the nearest.
        UsageError: a value of the wrong type, or no single `parameters` cell.
    """
    path = find_notebook(notebook)
    return checked_values(read_notebook(path), path, values)


def checked_values(nb: Any, path: Path, values: Mapping[str, object]) -> dict[str, Scalar]:
    """Like check_parameters, for a notebook that is already read."""
    if not values:
        return {}
    declared = {parameter.name: parameter for parameter in parameters_of(nb, path)}
    for name in values:
        if name not in declared:
            raise UnknownName(f"parameter of {path.stem}", name, declared)
    return {name: _convert(path.stem, declared[name], value) for name, value in values.items()}
