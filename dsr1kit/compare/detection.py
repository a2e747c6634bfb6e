"""How many questions, and answers to each, a plan needs, and what a given number of them can show.

Turns power.py's figures into rows and sentences, for an assumed accuracy and for pairs of channels of an earlier run.
Knows nothing about money or time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from dsr1kit.compare import power
from dsr1kit.compare.power import PairedPilot

#: Answers an item that a plan looks at; 64 is what DeepSeek's card takes for AIME.
SAMPLES = (1, 4, 16, 64)
ASSUMED = "assumed"
_FEW = 100  # questions: the variance that they show is off by a third one time in twenty, and more with fewer
_COUNTLESS = 10**9  # answers: what is left then lies between the items

Outcomes = Mapping[str, Sequence[bool]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """How many questions it takes to detect the difference.

    Attributes:
        basis: `assumed`, or the two channels of the earlier run whose spread it was taken from.
        items: questions, at `samples` answers to each.
        enough: whether the task has that many; None: it has no end, or its size is not known.
    """

    basis: str
    samples: int
    items: int
    enough: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """The smallest difference that so many questions detect.

    Attributes:
        samples: answers to each; None: however many.
        difference: a share; None: not even the largest one.
    """

    basis: str
    items: int
    samples: int | None
    difference: float | None


@dataclass(frozen=True, kw_only=True)
class Detection:
    """What is to be told apart, and what is known of the spread.

    Args:
        comparisons: pairs of channels; 0: there is nothing to tell apart.
        size: questions that the task has; None: without end, or not known.
        share: accuracy of the better channel where none was seen, a share; share_source: why that.
        pilots: by name, what two channels answered in an earlier run.
    """

    difference: float
    power: float
    comparisons: int
    size: int | None
    share: float
    share_source: str
    pilots: Mapping[str, tuple[Outcomes, Outcomes]]

    @cached_property
    def seen(self) -> dict[str, PairedPilot]:
        """The pilots that say something, their number of items in their names; empty: all is assumed."""
        found = ((name, power.pilot(a, b)) for name, (a, b) in self.pilots.items())
        return {f"{name} ({seen.items} items)": seen for name, seen in found if seen is not None}

    def items_for(self, samples: int) -> int:
        """Questions that detect the difference in every pair: by the earlier run where there is one, else assumed."""
        plans = [self._from(seen, samples) for seen in self.seen.values()] or [self._assumed(samples)]
        return max(plans)

    def fewest_samples(self) -> int:
        """Answers to each question that let the task's questions suffice.

        Where no number does, as many as show what any number would, to a tenth.
        """
        if not self.comparisons or self.size is None:
            return 1
        size, floor = self.size, self._worst(self.size, None)
        enough = (count for count in SAMPLES if self.items_for(count) <= size)
        nearly = (count for count in SAMPLES if self._worst(size, count) <= 1.1 * floor)
        return next(enough, None) or next(nearly, SAMPLES[-1])

    def needs(self, samples: int) -> Iterator[Need]:
        """What it takes, for several numbers of answers, `samples` among them."""
        for count in sorted({*SAMPLES, samples}) if self.comparisons else ():
            rows = {ASSUMED: self._assumed(count)} | {name: self._from(p, count) for name, p in self.seen.items()}
            for basis, items in rows.items():
                enough = None if self.size is None else items <= self.size
                yield Need(basis=basis, samples=count, items=items, enough=enough)

    def reaches(self, items: int, samples: int) -> Iterator[Reach]:
        """What so many questions detect, for several numbers of answers, `samples` among them, and for any number."""
        for count in (*sorted({*SAMPLES, samples}), None) if self.comparisons else ():
            for basis, seen in {ASSUMED: None, **self.seen}.items():
                yield Reach(basis=basis, items=items, samples=count, difference=self._reach(seen, items, count))

    def notes(self, items: int, samples: int) -> Iterator[str]:
        """What the figures rest on, and what the planned size cannot do."""
        if not self.comparisons:
            return
        yield f"{ASSUMED}: an accuracy of {self.share:.0%} ({self.share_source})"
        deepest = max((len(answers) for pair in self.pilots.values() for side in pair for answers in side.values()),
                      default=0)  # fmt: skip
        if not self.seen:
            yield (
                "half of what single answers vary is assumed to lie between the questions, which more answers to each "
                "do not lessen; an earlier run with several answers to each tells how much it is"
            )
        elif deepest == 1:
            yield (
                "the earlier run has one answer to each question, so what more answers would gain is not known and "
                "not counted on"
            )
        else:
            yield f"beyond the earlier run's {deepest} answers to each question, its figures are extrapolated"
        if few := [name for name, seen in self.seen.items() if seen.items < _FEW]:
            yield f"the spread of {'; '.join(few)} rests on few questions: take it as a rough figure"
        if items < self.items_for(samples):
            shown = f"{items:,} questions with {samples:,} answer(s) each detect {_points(self._worst(items, samples))}"
            more = next((count for count in SAMPLES if self.items_for(count) <= items), None)
            if more is not None:
                yield f"{shown}, not {_points(self.difference)}; with {more} answers to each they do"
            else:
                floor = _points(self._worst(items, None))
                yield (
                    f"{shown}, not {_points(self.difference)}; however many answers, {floor}, for questions differ "
                    "among themselves: only more of them go below that"
                )

    def _assumed(self, samples: int) -> int:
        return power.items_to_detect(
            self.difference, share_a=max(self.share, self.difference), samples=samples, power=self.power,
            comparisons=self.comparisons or 1,
        ).items  # fmt: skip

    def _from(self, seen: PairedPilot, samples: int) -> int:
        return power.items_from_pilot(
            seen, samples, self.power, difference=self.difference, comparisons=self.comparisons
        ).items

    def _worst(self, items: int, samples: int | None) -> float:
        """The smallest difference that is detected in every pair; 1 where not even the largest one is."""
        known: list[PairedPilot | None] = [*self.seen.values()] or [None]
        return max(self._reach(seen, items, samples) or 1.0 for seen in known)

    def _reach(self, seen: PairedPilot | None, items: int, samples: int | None) -> float | None:
        return power.detectable(
            items, share_a=None if seen else self.share, seen=seen, samples=samples or _COUNTLESS, power=self.power,
            comparisons=self.comparisons,
        )  # fmt: skip


def _points(share: float) -> str:
    return f"{100 * share:.3g} points"
