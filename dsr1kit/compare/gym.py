"""Questions of reasoning-gym's generators, by name, judged by the generator's own scorer.

An item holds what its generator's scorer wants to see again, or the place at which the generator makes it again.
Knows nothing about replies.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dsr1kit.compare.items import Item, TaskFacts, hashed, with_instruction
from dsr1kit.compare.scoring import last_boxed, plain_text, stated
from dsr1kit.errors import MissingExtra, RunError, UnknownName, UsageError
from dsr1kit.records import Verdict

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

PREFIX = "reasoning-gym:"
#: Settings of a generator, as (name, value) pairs.
Options = tuple[tuple[str, Any], ...]
#: Questions that one generator is asked for; some arrange theirs by how many there are, so it is always as many.
SIZE = 5_000
#: An option of the kit's own, for any generator whose answers are numbers: those with a smaller one are left out.
MIN_ANSWER = "min_answer"
#: The longest answer, in characters, that a generator's scorer is given.
LONGEST = 20_000

# Scorers that hand the answer to Python's own parser, by `eval` or sympy's parse_expr: neither gets more than this.
_EVALUATING = ("string_insertion", "spiral_matrix", "binary_matrix", "n_queens")
_SYMPY_READ = ("simple_integration", "intermediate_integration", "polynomial_multiplication", "puzzle24", "countdown")
_EXPRESSION = re.compile(r"[\w\s+\-*/^().,=]{1,1000}", re.ASCII)
_WORD = re.compile(
    r"[A-Za-z]\w{0,1}|sin|cos|tan|sec|csc|cot|asin|acos|atan|sinh|cosh|tanh|exp|log|ln|sqrt|Abs|pi", re.ASCII
)

# Generators whose questions hang on the order of a set of strings, which Python draws anew in every process.
_BY_HASH = ("isomorphic_strings", "list_functions", "polynomial_multiplication", "ransom_note")

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_LATEX = (
    ("\\times", "×"), ("\\cdot", "*"), ("\\div", "/"), ("\\left", ""), ("\\right", ""), ("\\,", ""), ("\\;", ""),
    ("\\{", "{"), ("\\}", "}"), ("\\_", "_"), ("\\ ", " "), ("−", "-"), ("÷", "/"), ("\\\\", "\n"), ("$", ""),
)  # fmt: skip
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_DRESSED = re.compile(r"\\(?:text|texttt|textbf|mathrm|mathbf)\{([^{}]*)\}")


def generators() -> tuple[str, ...]:
    """The names of all generators. Raises MissingExtra."""
    return tuple(sorted(set(_factory().DATASETS) - {"composite"}))  # that one is made of others, by configuration


def facts(task: str) -> TaskFacts:
    """What is known about one generator's task. Raises UnknownName, MissingExtra."""
    name, options = _known(task)
    told = "".join(f", {key} {value}" for key, value in options)
    return TaskFacts(
        name=task, title=f"reasoning-gym, {name.replace('_', ' ')}{told}", source=f"reasoning_gym {_version()}",
        license="Apache-2.0",
    )  # fmt: skip


def load(task: str, items: int, seed: int) -> list[Item]:
    """The first `items` questions of `reasoning-gym:NAME` or `reasoning-gym:NAME:OPTION=VALUE,...`, no two alike.

    Options are the generator's own settings, such as `chain_sum:max_terms=3,max_digits=2`, and the kit's `min_answer`:
    questions with a smaller answer are left out (0: none below zero).

    Raises:
        UnknownName: no such generator or option.
        UsageError: more than it makes.
        MissingExtra: the package is not installed.
    """
    name, options = _known(task)
    elsewhere = name in _BY_HASH and not _hashes_as_anywhere()
    made = (_made_elsewhere if elsewhere else _made)(name, items, seed, options)
    if len(made) < items:
        raise UsageError(
            f"{task} made {len(made):,} different questions with seed {seed}, not {items:,}: ask for at most that many"
        )
    return [Item(**one) for one in made]


def _made(name: str, items: int, seed: int, options: Options = ()) -> list[dict[str, str]]:
    # Generators add a question's place to the seed: near seeds would share nearly all questions.
    own_seed = int.from_bytes(hashlib.sha256(f"{name}/{seed}".encode()).digest()[:4], "big") >> 1
    least = dict(options).get(MIN_ANSWER)
    options = _of_generator(options)
    dataset = _dataset(name, own_seed, options)
    found: dict[str, dict[str, str]] = {}
    for index in range(SIZE):
        if len(found) == items:
            break
        entry = dataset[index]
        if least is not None and not _at_least(entry["answer"], least, name):
            continue
        question = str(entry["question"]).strip()
        reference: dict[str, Any] = {"generator": name, "seed": own_seed, "index": index, "question": hashed(question)}
        if options:
            reference["options"] = options
        if name in _BY_HASH:  # whose scorers look at the answer alone
            reference["entry"] = {"question": question, "answer": entry["answer"]}
        elif _survives_json(entry):
            reference["entry"] = entry
        made = {
            "id": f"{name}-{hashed(question)}",
            "prompt": with_instruction(question, "reasoning-gym", "en"),
            "gold": "" if entry["answer"] is None else str(entry["answer"]),
            "kind": name,
            "language": "en",
            "scorer": "reasoning-gym",
            "reference": json.dumps(reference, sort_keys=True),
        }
        found.setdefault(question, made)
    return list(found.values())


def _made_elsewhere(name: str, items: int, seed: int, options: Options = ()) -> list[dict[str, str]]:
    """As `_made`, in a process whose hashes are those of every other such process."""
    asked = json.dumps([sys.path, name, items, seed, options])
    done = subprocess.run(  # noqa: S603 - this very interpreter
        [sys.executable, "-W", "ignore", "-c", _PROGRAM, asked],
        env=os.environ | {"PYTHONHASHSEED": "0"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RunError(f"{PREFIX}{name} failed: {done.stderr.strip().rpartition(chr(10))[2][:300]}")
    made: list[dict[str, str]] = json.loads(done.stdout.rpartition("\n\n")[2])
    return made


_PROGRAM = """
import json, sys
path, name, items, seed, options = json.loads(sys.argv[1])
sys.path[:] = path
from dsr1kit.compare import gym
made = gym._made(name, items, seed, tuple(map(tuple, options)))
print("\\n\\n" + json.dumps(made))
"""


def _hashes_as_anywhere() -> bool:
    return sys.flags.hash_randomization == 0


def _at_least(answer: Any, least: float, name: str) -> bool:
    try:
        return float(answer) >= least
    except (TypeError, ValueError):
        raise UsageError(
            f"{PREFIX}{name} has answers that are no numbers ({str(answer)[:40]!r}): no {MIN_ANSWER}"
        ) from None


def _survives_json(entry: dict[str, Any]) -> bool:
    try:
        return bool(json.loads(json.dumps(entry)) == entry)
    except (TypeError, ValueError):
        return False


def score(answer: str, reference: str) -> Verdict:
    """Whether the generator gives the answer its full score: `right`, else `wrong`.

    The answer is the last box, or what stands in `<answer>` tags, or behind the last "Answer:", or all of it; it is
    tried as it stands and with LaTeX's signs made plain ones. `unscored` where the generator no longer makes that
    question, as another version may.

    Raises:
        MissingExtra: the package is not installed.
    """
    told = json.loads(reference)
    name = told["generator"]
    dataset = _dataset(name, told["seed"], tuple(map(tuple, told.get("options", ()))))
    entry = told.get("entry") or dataset[told["index"]]
    if hashed(str(entry["question"]).strip()) != told["question"]:
        return "unscored"
    for one in _candidates(answer):
        if name in _SYMPY_READ and not _harmless(one):
            continue
        # Some generators fail on an answer that is not of their form.
        with contextlib.suppress(Exception):
            if float(dataset.score_answer(one, entry=entry)) >= 1 - 1e-9:
                return "right"
    return "wrong"


def _candidates(answer: str) -> list[str]:
    tagged = _TAG.findall(answer) if last_boxed(answer) is None and len(answer) <= LONGEST else []
    text = (tagged[-1] if tagged else stated(answer)).strip()
    plain = _FRACTION.sub(r"(\1)/(\2)", _DRESSED.sub(r"\1", text))
    for sign, meant in _LATEX:
        plain = plain.replace(sign, meant)
    plain = plain.strip()
    found = dict.fromkeys((text, plain, plain.replace("×", "*"), plain_text(plain)))
    return [one for one in found if 0 < len(one) <= LONGEST]


def _harmless(text: str) -> bool:
    """Whether an answer is an expression and no program."""
    if not _EXPRESSION.fullmatch(text) or "__" in text or re.search(r"\.\s*[A-Za-z_]", text):
        return False
    # A tower of powers takes all memory there is; numbers of a question have few digits.
    if re.search(r"(?:\*\*|\^)\s*\(?\s*\d{3,}|(?:\*\*|\^)[^+\-*/()]*(?:\*\*|\^)", text):
        return False
    return all(_WORD.fullmatch(word) for word in re.findall(r"[A-Za-z_]\w*", text))


def _known(task: str) -> tuple[str, Options]:
    """Generator and options of a task's name."""
    name, _, told = task.removeprefix(PREFIX).partition(":")
    names = generators()
    if name not in names:
        raise UnknownName(
            "reasoning-gym generator", name, names, hint=f"All {len(names)}: {', '.join(names)}" if not name else ""
        )
    options = []
    for part in filter(None, told.split(",")):
        key, _, value = part.partition("=")
        try:
            options.append((key.strip(), ast.literal_eval(value)))
        except (ValueError, SyntaxError):
            raise UsageError(f"{task}: an option is NAME=VALUE, such as max_terms=3, not {part!r}") from None
    if options:
        fields = dataclasses.fields(_factory().DATASETS[name][1])
        known = {field.name for field in fields} - {"seed", "size"} | {MIN_ANSWER}
        for key, value in options:
            if key not in known:
                raise UnknownName(f"option of {name}", key, known)
            if key == MIN_ANSWER and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise UsageError(f"{task}: {MIN_ANSWER} must be a number, not {value!r}")
        try:
            _dataset(name, 0, _of_generator(options))
        except (AssertionError, TypeError, ValueError) as error:
            raise UsageError(f"{task}: {str(error) or 'a value is out of range'}") from None
    return name, tuple(options)


def _of_generator(options: Iterable[tuple[str, Any]]) -> Options:
    """Without the kit's own option."""
    return tuple(option for option in options if option[0] != MIN_ANSWER)


@lru_cache(maxsize=8)
def _dataset(name: str, seed: int, options: Options = ()) -> ProceduralDataset:
    dataset = _factory().create_dataset(name, seed=seed, size=SIZE, **dict(options))
    if name in _EVALUATING:
        # Their scorers evaluate the answer, which a model wrote: literals are all that they get.
        sys.modules[type(dataset).__module__].__dict__["eval"] = ast.literal_eval
    return dataset


def _factory() -> Any:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise MissingExtra("a reasoning-gym task", "tasks", "reasoning-gym")
    import reasoning_gym.factory

    return reasoning_gym.factory


def _version() -> str:
    import importlib.metadata

    return importlib.metadata.version("reasoning-gym")
