"""What this machine is good for: the model that the notebooks run on it unless told otherwise.

Choices come with their reason, so that a person can disagree with it.
"""

from __future__ import annotations

from typing import NamedTuple

TINY, DISTILL = "tiny-r1", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"


class Choice(NamedTuple):
    """What was chosen, and why."""

    value: str
    reason: str


def default_model(wanted: str = "auto") -> Choice:
    """The local model to run: `wanted` itself, or, for `auto`, what suits the hardware.

    With a CUDA GPU R1's smallest distill (1.5B: about 3.6 GB in 16 bits, fits a T4), without one the
    embedded tiny-r1, which is no R1 but runs anywhere.
    """
    if wanted != "auto":
        return Choice(wanted, "as asked")
    import torch

    if torch.cuda.is_available():
        return Choice(DISTILL, f"a GPU is here ({torch.cuda.get_device_name(0)}): R1's smallest distill")
    return Choice(TINY, "no GPU here: the embedded model, which is not R1")
