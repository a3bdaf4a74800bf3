"""Where runs are trained and scored: a folder with the night's rules, a device, its sandbox and the training rows."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from constants import Problem, Settings, sha256_of

# Frozen with the night: name there, place in the checkout.
HARNESS = {"constants.py": "constants.py", "prepare.py": "prepare.py", "score.py": "lab/measure/score.py"}


@dataclass
class Place:
    """A night's own folder, or that of one worker of a night with several."""

    folder: Path
    settings: Settings
    device_id: str  # of the device that this start runs on
    _: KW_ONLY
    sandbox: object | None = None  # lab.measure.sandbox.Sandbox
    say: Callable[[str], None] = print  # a line for the terminal
    until: float = math.inf  # by perf_counter: when no further run may begin, by --hours
    last_exit: float | None = None  # when the last child ended, by perf_counter
    stop: threading.Event = field(default_factory=threading.Event)  # set when the night ends: what runs is ended

    @property
    def tier(self) -> str:
        return self.sandbox.tier if self.sandbox else "none"

    @property
    def out_of_time(self) -> bool:
        """Whether --hours leave no room for a run."""
        return time.perf_counter() > self.until

    @property
    def rows(self) -> Path:
        """The training rows, as linked or copied for this night."""
        return self.folder / "text" / self.settings.train_file

    def data_file(self, name: str) -> Path:
        """Where a data file is read: the training rows from the night's own link or copy, if it has one."""
        return self.rows if name == self.rows.name and self.rows.exists() else Path(self.settings.data) / name

    def check_unchanged(self) -> None:
        """Raises Problem if harness or data are no longer what the night began with; once in each start.

        After that they are read-only in the sandbox, or out of its sight.
        """
        harness, another = self.folder / "harness", "changed since the night began; start another one with --tag NEW"
        self.refuse_missing()
        for name, expected in self.settings.harness_sha256.items():
            if sha256_of(harness / name) != expected:
                raise Problem(f"{harness / name} {another}")
        for name, expected in self.settings.data_sha256.items():
            if sha256_of(self.data_file(name)) != expected:
                raise Problem(f"{Path(self.settings.data) / name} {another}")

    def refuse_missing(self) -> None:
        """Raises Problem if a file of harness or data is gone."""
        for path in (
            *(self.folder / "harness" / name for name in HARNESS),
            *map(self.data_file, self.settings.data_sha256),
        ):
            if not path.is_file():
                how = "restore it (data: python prepare.py), or start another night with --tag NEW"
                raise Problem(f"{path} is gone; {how}")
