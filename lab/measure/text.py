"""The training text: one link or copy of the rows for the night, and a link in a run's folder while its clock runs.

A run's text/ is empty until its clock starts, gone after its end, and read-only in the sandbox: nobody reads text before the clock.
"""

import contextlib
import os
import shutil
from pathlib import Path

from constants import Problem
from lab.measure.files import remove
from lab.measure.place import Place


@contextlib.contextmanager
def rows_of_the_night(place: Place):
    """Within it the night's folder has the training rows, on one file system with its runs: linked, else copied. Raises Problem."""
    source = Path(place.settings.data) / place.settings.train_file
    for left in (place.rows.parent, *place.folder.glob("*/text")):  # by an agent that was killed
        remove(left)
    place.rows.parent.mkdir()
    try:
        try:
            os.link(source, place.rows)
        except OSError:  # another file system, or a file of another user
            copy(source, place.rows)
        place.linked_again()
        place.check_unchanged()
        yield
    finally:
        remove(place.rows.parent)


def copy(source: Path, target: Path) -> None:
    needed, free = source.stat().st_size, shutil.disk_usage(target.parent).free
    if needed > free:
        few = f"{source} cannot be linked to {target.parent}, and a copy takes {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB free"
        raise Problem(f"{few}; free space there, or set AUTORESEARCH_CACHE to a folder beside the checkout")
    shutil.copyfile(source, target)


def hand_over(place: Place, folder: Path) -> None:
    """Links the rows into the text/ of a run's folder."""
    with place.linking():
        os.link(place.rows, folder / "text" / place.rows.name)


def take_back(place: Place, folder: Path) -> None:
    """Removes the text/ of a run's folder."""
    with place.linking():
        remove(folder / "text")
