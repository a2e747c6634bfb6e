"""What is wrong with training data, before a model learns it: each example kept, or dropped with its reason.

Empty and cut-off traces, answers that disagree with the gold, duplicates, overlap with the questions of the
evaluation, lengths against the context. Knows examples and scorers; of models only how many tokens a text has.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsr1kit.compare.items import Item, with_instruction
from dsr1kit.compare.judge import Judge
from dsr1kit.errors import UsageError
from dsr1kit.finetune.data import Example
from dsr1kit.records import Outcome, Reply, Verdict
from dsr1kit.thinking import CLOSE, OPEN

if TYPE_CHECKING:
    import pandas as pd

#: Why an example is dropped, in the order in which it is looked for.
REASONS: Mapping[str, str] = {
    "empty answer": "there is nothing to answer with",
    "empty trace": "there is no reasoning to learn",
    "cut off": "trace or answer ends in the middle, or holds a think tag: an open tag, box or brace",
    "disagrees": "the answer is not the gold",
    "duplicate": "the same question with the same trace stands before it",
    "asked in the evaluation": "the evaluation asks the same question",
    "overlaps the evaluation": "13 words in a row stand in a question of the evaluation too",
    "too long": "it does not fit the context that is trained with",
}
NGRAM = 13

_WORD = re.compile(r"[\u3400-\u9fff]|[^\W_]+", re.UNICODE)
#: With the signs that make another question of the same words: 12 + 34, 12 - 34, 1.5.
_SIGNED = re.compile(r"[\u3400-\u9fff]|\d+[.,]\d+|[^\W_]+|[+\-\u2212*/^=<>\u00d7\u00f7%]", re.UNICODE)
_WORDED = tuple(
    " ".join(_WORD.findall(with_instruction("", scorer, language)))
    for scorer in ("math", "choice")
    for language in ("en", "zh")
)


@dataclass(frozen=True, slots=True)
class Dropped:
    """An example that is not trained on, and why: a key of `REASONS`."""

    example: Example
    reason: str


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of the examples that were kept: of prompt and completion together, by percentile."""

    context: int
    p50: int
    p95: int
    longest: int
    total: int


@dataclass(frozen=True, slots=True)
class Checked:
    """What came of the checks.

    Attributes:
        kept: examples to train on, in their order.
        dropped: the others.
        unscored: of those kept, how many have no gold, or one that cannot be read.
        repeated: of those kept, how many ask a question that another one asks, with another trace.
        lengths: in tokens; None where they were not counted.
    """

    kept: tuple[Example, ...]
    dropped: tuple[Dropped, ...]
    unscored: int
    repeated: int
    lengths: Lengths | None

    @property
    def counts(self) -> dict[str, int]:
        """How many were dropped for which reason."""
        counted = Counter(one.reason for one in self.dropped)
        return {reason: counted[reason] for reason in REASONS if counted[reason]}

    def told(self) -> list[str]:
        """Lines for a person: what was kept, what was dropped and why, with an example each, and the lengths."""
        many = f"{len(self.kept):,} of {len(self.kept) + len(self.dropped):,} examples kept"
        said = [f"{many}; {self.unscored:,} of them without a gold to hold the answer against"]
        for reason, count in self.counts.items():
            first = next(one.example for one in self.dropped if one.reason == reason)
            said.append(f"{count:,} dropped, {reason}: {REASONS[reason]} (such as {first.source or first.id})")
        if self.repeated:
            said.append(f"{self.repeated:,} ask a question that another one asks, with another trace: kept")
        if at := self.lengths:
            said.append(
                f"tokens: median {at.p50:,}, 95 % below {at.p95:,}, longest {at.longest:,} of {at.context:,}; "
                f"{at.total:,} in all"
            )
        return said

    def table(self) -> pd.DataFrame:
        """Counts by reason, as a frame."""
        import pandas as pd

        rows = {"kept": (len(self.kept), "")} | {why: (n, REASONS[why]) for why, n in self.counts.items()}
        return pd.DataFrame.from_dict(rows, orient="index", columns=["examples", "meaning"])


async def check(
    examples: Sequence[Example],
    *,
    evaluation: Iterable[Item] = (),
    length: Callable[[Example], int] | None = None,
    context: int = 0,
    needs_reasoning: bool = True,
) -> Checked:
    """Look at every example, and keep those that are worth training on.

    Args:
        examples: in the order in which they count: of duplicates the first is kept.
        evaluation: what will be asked to measure; questions that overlap are dropped, by their words with R1's
            instruction left out: the same question, or 13 words in a row of one (Chinese signs count as words).
        length: tokens of one example as it will be trained on; None: lengths are not looked at.
        context: most tokens that one may have.
        needs_reasoning: whether an example without a trace is dropped.

    Raises:
        UsageError: no example is left; says what was wrong with how many.
    """
    asked, grams = _questions(evaluation)
    seen: set[tuple[str, str, str]] = set()
    questions: Counter[str] = Counter()
    kept: list[Example] = []
    dropped: list[Dropped] = []
    lengths: list[int] = []
    unscored = 0
    for one, verdict in zip(examples, await verdicts(examples), strict=True):
        tokens = length(one) if length is not None else 0
        reason = _reason(one, verdict, seen, asked, grams, needs_reasoning=needs_reasoning)
        if not reason and length is not None and tokens > context:
            reason = "too long"
        if reason:
            dropped.append(Dropped(one, reason))
            continue
        seen.add(_key(one))
        questions[_plain(one.question)] += 1
        kept.append(one)
        lengths.append(tokens)
        unscored += verdict == "unscored"
    if not kept:
        found = Checked((), tuple(dropped), 0, 0, None)
        why = ", ".join(f"{n:,} {reason}" for reason, n in found.counts.items()) or "there were none"
        raise UsageError(f"no usable example is left of {len(examples):,}: {why}. " + "; ".join(found.told()[1:]))
    repeated = sum(count - 1 for count in questions.values())
    return Checked(tuple(kept), tuple(dropped), unscored, repeated, _lengths(lengths, context) if length else None)


def _lengths(tokens: list[int], context: int) -> Lengths:
    import numpy as np

    p50, p95 = np.percentile(tokens, [50, 95])
    return Lengths(context, int(p50), int(p95), max(tokens), sum(tokens))


def _reason(
    one: Example,
    verdict: str,
    seen: set[tuple[str, str, str]],
    asked: set[str],
    grams: set[tuple[str, ...]],
    *,
    needs_reasoning: bool,
) -> str:
    if not one.answer.strip():
        return "empty answer"
    if needs_reasoning and not one.reasoning.strip():
        return "empty trace"
    if _cut_off(one):
        return "cut off"
    if verdict == "wrong":
        return "disagrees"
    if _key(one) in seen:
        return "duplicate"
    if worded(one.question) in asked:
        return "asked in the evaluation"
    if grams and not grams.isdisjoint(_grams(_words(one.question))):
        return "overlaps the evaluation"
    return ""


async def verdicts(examples: Sequence[Example]) -> list[Verdict]:
    """Each answer held against its gold; `unscored` where there is none."""
    found: list[Verdict] = []
    async with Judge() as judge:
        for one in examples:
            if not one.gold:
                found.append("unscored")
                continue
            item = Item(one.id, one.question, one.gold, one.kind, one.language, one.scorer)
            found.append(await judge.verdict(Reply(Outcome.OK, answer=one.answer), item))
    return found


def _cut_off(one: Example) -> bool:
    """Whether a text stops in the middle, by what can be told from its signs alone."""
    if any(tag in text for tag in (OPEN, CLOSE) for text in (one.answer, one.reasoning)):
        return True
    return any(text.count("\\boxed{") > 0 and not _closed(text) for text in (one.answer, one.reasoning[-2000:]))


def _closed(text: str) -> bool:
    """Whether the last box of a text is closed."""
    depth = 0
    for sign in text[text.rindex("\\boxed{") :]:
        depth += (sign == "{") - (sign == "}")
        if sign == "}" and depth == 0:
            return True
    return False


def _key(one: Example) -> tuple[str, str, str]:
    return _plain(one.question), _plain(one.reasoning), _plain(one.answer)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split()).casefold()


def worded(text: str) -> str:
    """What is asked, as a name of the question: its words and signs of arithmetic alone, without R1's instruction."""
    return " ".join(_words(text, _SIGNED))


def apart_from(items: Sequence[Item], evaluation: Iterable[Item]) -> list[Item]:
    """The questions that the evaluation does not ask, by their words."""
    asked = {worded(item.prompt) for item in evaluation}
    return [item for item in items if worded(item.prompt) not in asked]


def _words(text: str, word: re.Pattern[str] = _WORD) -> list[str]:
    """Words of a text, Chinese signs singly, without R1's instruction, which all questions share."""
    joined = " ".join(word.findall(unicodedata.normalize("NFKC", text)))
    for shared in _WORDED:
        joined = joined.replace(shared, " ")
    return joined.casefold().split()


def _grams(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(words[at : at + NGRAM]) for at in range(len(words) - NGRAM + 1)}


def _questions(items: Iterable[Item]) -> tuple[set[str], set[tuple[str, ...]]]:
    asked: set[str] = set()
    grams: set[tuple[str, ...]] = set()
    for item in items:
        asked.add(worded(item.prompt))
        grams |= _grams(_words(item.prompt))
    return asked, grams
