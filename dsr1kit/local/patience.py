"""How long a download bears with a hub: clocks, and attempts in a row that may bring nothing.

Knows no HTTP.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tenacity


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to bear with a hub.

    Attributes:
        connect_s: longest wait for a connection, seconds.
        stall_s: longest silence while bytes are due, seconds.
        retries: attempts in a row that may bring nothing before it is given up.
        wait_s: upper bound of the wait before the second attempt, seconds; doubled for each next one, at most 60.
    """

    connect_s: float = 20.0
    stall_s: float = 30.0
    retries: int = 6
    wait_s: float = 1.0


class Temporary(Exception):
    """Something that may go well when tried again; `retry_after_s` is what the far side asked for, in seconds."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Persistence:
    """Repeats what is Temporary until `patience.retries` attempts in a row have brought nothing."""

    def __init__(self, patience: Patience) -> None:
        self._patience, self._fruitless = patience, 0

    def progressed(self) -> None:
        """Count the attempts from anew: something came."""
        self._fruitless = 0

    def attempts(self) -> tenacity.AsyncRetrying:
        """Return the loop of attempts; the last error is raised as it is."""
        from tenacity import AsyncRetrying, retry_if_exception_type

        def failed(_: object) -> None:
            self._fruitless += 1

        return AsyncRetrying(
            retry=retry_if_exception_type(Temporary),
            after=failed,
            wait=self._wait_s,
            stop=lambda _: self._fruitless > self._patience.retries,
            reraise=True,
        )

    def _wait_s(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.retry_after_s if isinstance(error, Temporary) else 0.0
        # tenacity's own exponential waits grow with all attempts, also with those that brought something.
        return max(asked, random.uniform(0.0, min(60.0, self._patience.wait_s * 2 ** max(0, self._fruitless - 1))))
