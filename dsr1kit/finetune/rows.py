"""The order in which rows are trained on: known before the first step, by the seed alone.

So a run that was killed goes on with the very row that was next, and several processes see together what one alone
would. Rows of like length share a batch, which leaves little to pad. Knows numbers alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from dsr1kit.errors import UsageError

#: Batches whose rows are sorted by length together: many pad less, few mix more.
_TOGETHER = 32


def row_order(lengths: Sequence[int], batch: int, steps: int, seed: int) -> list[int]:
    """Indices of the rows of `steps` batches, one batch behind the other.

    Every pass goes over all rows, shuffled by seed and pass; what is left of one begins the next, so that all batches
    are full.

    Args:
        lengths: of the rows, in tokens.
        batch: rows that make one step, over all processes and accumulated batches.
        steps: how many.
        seed: of the order.
    """
    if not lengths or batch < 1 or steps < 0:
        raise UsageError(f"an order needs rows, a batch and steps, not {len(lengths)} rows, {batch} and {steps}")
    wanted, rows = batch * steps, len(lengths)
    order: list[int] = []
    for number in range(math.ceil(wanted / rows)):
        shuffled = list(range(rows))
        random.Random(f"rows/{seed}/{number}").shuffle(shuffled)
        order += shuffled
    found: list[int] = []
    while (at := len(found)) < wanted:
        # Of one pass alone, or a batch would hold the same row several times.
        here = (rows - at % rows) // batch
        end = min(wanted, at + batch * min(max(here, 1), _TOGETHER))
        alike = sorted(order[at:end], key=lengths.__getitem__)
        batches = [alike[start : start + batch] for start in range(0, len(alike), batch)]
        random.Random(f"batches/{seed}/{at}").shuffle(batches)
        found += [row for some in batches for row in some]
    return found


def steps_for(rows: int, batch: int, epochs: float) -> int:
    """Steps that pass `epochs` times over all rows, at least one."""
    return max(1, math.ceil(rows * epochs / batch - 1e-9))
