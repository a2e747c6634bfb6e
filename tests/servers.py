"""Servers of others that tests run for real: found, or the test is skipped by name; in CI they must be there."""

from __future__ import annotations

import os
import shutil

import pytest


def needed(binary: str) -> str:
    """The path of a server's program; without it the test is skipped, or fails where DSR1KIT_NEEDS_SERVERS is set."""
    path = shutil.which(binary) or shutil.which(binary, path="/usr/sbin:/usr/local/sbin")
    if path is None:
        why = f"{binary} is not installed (Debian: apt-get install {binary})"
        if os.environ.get("DSR1KIT_NEEDS_SERVERS"):
            pytest.fail(why)
        pytest.skip(why)
    return path
