"""Are vendors that differ told apart, and equal ones not?

    python benchmarks/told_apart.py [--json] [--comparisons 2000] [--items 200] [--seed 0]
    python benchmarks/told_apart.py --record            # makes the pool again: tiny-r1, ten minutes on two cores

The pool holds tiny-r1's answers, right or not, to 1,400 held-out questions, eight a question by each of three
vendors: the weights in float32 at R1's sampling, the same in 4 bits, the same at temperature 1.5. A comparison is
drawn from it: questions with replacement, since an interval speaks of all questions of their kind, and for each of
them answers without, since every answer is asked for once. Two channels that serve the same weights divide the
eight answers of one vendor between them, so that whatever is claimed about them is false. Two that do not are
compared on as many questions as the planner says for 80 % power, out of the spread of the whole pool.

Printed is how often `paired_difference` claims a difference: 3.5 to 6.5 % of comparisons between equals, 75 to 86 %
of those between unequals. Ends with 1 where a figure lies outside.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import gzip
import hashlib
import io
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dsr1kit.compare.power import items_from_pilot, pilot
from dsr1kit.compare.stats import paired_difference

POOL = Path(__file__).parent / "pool" / "tiny-r1-arithmetic.csv.gz"
#: What stands for a vendor: how tiny-r1 is loaded, and how it draws. The first is R1's own sampling at full precision.
VARIANTS = {
    "float32": ("none", 0.6),
    "4bit": ("4bit", 0.6),
    "hot": ("none", 1.5),
}
ITEMS, SAMPLES, SEED = 1400, 8, 2026
LONGEST = 400
EQUAL, UNEQUAL = (0.035, 0.065), (0.75, 0.86)
#: For each vendor, right or not: [item, sample].
Pool = dict[str, np.ndarray]


@dataclass(frozen=True)
class Row:
    """One kind of comparison: what was claimed of how many of them."""

    a: str
    b: str
    samples: int
    items: int
    comparisons: int
    difference: float
    claimed: float
    least: float
    most: float

    @property
    def holds(self) -> bool:
        return self.least <= self.claimed <= self.most


def read_pool(path: Path = POOL) -> Pool:
    flags: dict[str, list[list[bool]]] = {}
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            flags.setdefault(row["variant"], []).append([flag == "1" for flag in row["right"]])
    return {variant: np.array(rows) for variant, rows in flags.items()}


def as_outcomes(flags: np.ndarray) -> dict[str, list[bool]]:
    return {str(at): row for at, row in enumerate(flags.tolist())}


def draw(pool: Pool, a: str, b: str, items: int, samples: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """What two channels answered: [item, sample] each."""
    picked = rng.integers(len(pool[a]), size=items)
    if a == b:
        shuffled = rng.permuted(pool[a][picked], axis=1)
        return shuffled[:, :samples], shuffled[:, samples : 2 * samples]
    return tuple(rng.permuted(pool[name][picked], axis=1)[:, :samples] for name in (a, b))


def claims(pool: Pool, a: str, b: str, items: int, samples: int, comparisons: int, seed: int) -> float:
    """The share of comparisons that claim a difference."""
    rng = np.random.default_rng([seed, samples, *map(ord, a + b)])
    claimed = 0
    for _ in range(comparisons):
        one, other = draw(pool, a, b, items, samples, rng)
        told = paired_difference(as_outcomes(one), as_outcomes(other))
        assert told is not None
        claimed += told.excludes_zero
    return claimed / comparisons


def equal(pool: Pool, name: str, samples: int, items: int, comparisons: int, seed: int = 0) -> Row:
    share = claims(pool, name, name, items, samples, comparisons, seed)
    return Row(name, name, samples, items, comparisons, 0.0, share, *EQUAL)


def unequal(pool: Pool, a: str, b: str, samples: int, comparisons: int, seed: int = 0) -> Row:
    seen = pilot(as_outcomes(pool[a]), as_outcomes(pool[b]))
    assert seen is not None
    plan = items_from_pilot(seen, samples, 0.8)
    share = claims(pool, a, b, plan.items, samples, comparisons, seed)
    return Row(a, b, samples, plan.items, comparisons, seen.difference, share, *UNEQUAL)


def compare(pool: Pool, items: int, comparisons: int, samples: Sequence[int] = (1, 4), seed: int = 0) -> list[Row]:
    """All rows; comparisons between unequals are half as many."""
    first, *others = pool
    rows = [equal(pool, name, k, items, comparisons, seed) for name in pool for k in samples]
    return rows + [unequal(pool, first, name, k, comparisons // 2, seed) for name in others for k in samples]


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'a':8} {'b':8} {'samples':>7} {'items':>6} {'apart':>7} {'claimed':>8}   wanted        of"]
    for row in rows:
        verdict = "" if row.holds else "   OUTSIDE"
        lines.append(
            f"{row.a:8} {row.b:8} {row.samples:7} {row.items:6,} {100 * row.difference:5.1f} p {row.claimed:8.2%}   "
            f"{row.least:.1%}-{row.most:.1%}  {row.comparisons:5,}{verdict}"
        )
    return "\n".join(lines)


def seed_of(variant: str, item: str) -> int:
    """Every vendor draws for itself, and every question anew: samples share no random number."""
    return int.from_bytes(hashlib.sha256(f"{variant} {item}".encode()).digest()[:4])


async def record(items: int, samples: int) -> bytes:
    """Ask every variant every held-out question `samples` times: a line a variant and item, a flag a sample."""
    from dsr1kit import LocalModel, Sampling
    from dsr1kit.compare.judge import verdict_of
    from dsr1kit.compare.tasks import load_task

    asked = load_task("arithmetic", items, SEED)
    lines = []
    for variant, (quantization, temperature) in VARIANTS.items():
        began = time.monotonic()
        async with LocalModel("tiny-r1", quantization=quantization, dtype="float32") as model:
            rows = [
                (item, Sampling(temperature, 0.95, LONGEST, seed_of(variant, item.id), sample=k))
                for item in asked
                for k in range(samples)
            ]
            replies = await model.generate_many([item.messages() for item, _ in rows], [drawn for _, drawn in rows])
        verdicts = [verdict_of(reply, item) for (item, _), reply in zip(rows, replies, strict=True)]
        for at, item in enumerate(asked):
            flags = "".join("1" if v == "right" else "0" for v in verdicts[at * samples : (at + 1) * samples])
            lines.append((variant, item.id, item.kind, flags))
        right = sum(v == "right" for v in verdicts) / len(verdicts)
        unscored = verdicts.count("unscored")  # no answer came: not right
        told = f"{right:.1%} right of {len(verdicts)}, {unscored} without an answer, {time.monotonic() - began:.0f} s"
        print(f"{variant}: {told}", file=sys.stderr, flush=True)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("variant", "item", "kind", "right"), *lines])
    # No time stamp inside: the same replies give the same bytes.
    return gzip.compress(text.getvalue().encode(), 9, mtime=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="make the pool anew, then stop")
    parser.add_argument("--pool", type=Path, default=POOL)
    parser.add_argument("--items", type=int, help=f"between equals, default 200; with --record {ITEMS}")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="answers a question, with --record")
    parser.add_argument("--comparisons", type=int, default=2000, help="between equals; unequals get half as many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.record:
        recorded = asyncio.run(record(args.items or ITEMS, args.samples))
        args.pool.parent.mkdir(parents=True, exist_ok=True)
        args.pool.write_bytes(recorded)
        return 0
    pool = read_pool(args.pool)
    rows = compare(pool, args.items or 200, args.comparisons, seed=args.seed)
    right = {name: round(float(flags.mean()), 4) for name, flags in pool.items()}
    if args.json:
        summary = {"pool": right, "rows": [asdict(row) | {"holds": row.holds} for row in rows]}
        print(json.dumps(summary))
    else:
        print("right in the pool: " + ", ".join(f"{name} {share:.1%}" for name, share in right.items()))
        print(table(rows))
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
