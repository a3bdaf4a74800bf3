"""Compile caches: each run starts from the night's, and what it compiled before its clock, when it had no text, may become the night's.

A run writes to its own copy alone. When its clock starts the agent sets that aside by source: a second run of the same source begins
with it, and a keep makes it the night's.
"""

import os
from pathlib import Path

from lab.measure.files import OUT_BYTES, copy_regular_files, names_within, remove


def aside(night: Path, source: str) -> Path:
    """Where the cache of a source (its sha256) is kept until its verdict."""
    return night / f"cache-{source[:16]}"


def fill(night: Path, source: str, target: Path) -> None:
    """Gives a run the cache of its own source, else the night's."""
    for place in (aside(night, source), night / "cache"):
        if place.exists():
            copy_regular_files(place, target, OUT_BYTES)
            return


def set_aside(night: Path, source: str, made: Path) -> None:
    """Keeps what a run has compiled, if that is more than it was given. A kill leaves the whole or nothing."""
    place = aside(night, source)
    known = place if place.exists() else night / "cache"
    if all(os.path.exists(f"{known}/{name}") for name in names_within(made)):  # False for a path that is too long
        return
    fresh = place.with_suffix(".new")
    remove(fresh)
    copy_regular_files(made, fresh, OUT_BYTES)
    remove(place)
    os.replace(fresh, place)


def settle(night: Path, source: str, kept: bool) -> None:
    """After a verdict: the cache of a kept source becomes the night's, else it goes."""
    if kept and aside(night, source).exists():
        remove(night / "cache")
        os.replace(aside(night, source), night / "cache")
    remove(aside(night, source))


def clear(night: Path) -> None:
    """Of sources without a verdict: of --check and --ablate, of an earlier start."""
    for place in night.glob("cache-*"):
        remove(place)
