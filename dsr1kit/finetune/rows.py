"""The order in which rows are trained on: known before the first step, by the seed alone.

So a run that was killed goes on with the very row that was next, and several processes see together what one alone
would. A step's rows are drawn from all; within it they stand by length, so that the batches that it is accumulated
from have little to pad. (Steps of rows of like length would pad less and learn worse: each would teach another kind of
problem.) Knows numbers alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from dsr1kit.errors import UsageError


def row_order(lengths: Sequence[int], batch: int, steps: int, seed: int) -> list[int]:
    """Indices of the rows of `steps` steps, one step behind the other, each by length.

    Every pass goes over all rows, shuffled by seed and pass; what is left of one begins the next, so that all steps
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
    steps_rows = (order[at : at + batch] for at in range(0, wanted, batch))
    return [row for rows_of_step in steps_rows for row in sorted(rows_of_step, key=lengths.__getitem__)]


def steps_for(rows: int, batch: int, epochs: float) -> int:
    """Steps that pass `epochs` times over all rows, at least one."""
    return max(1, math.ceil(rows * epochs / batch - 1e-9))
