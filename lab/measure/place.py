"""Where runs are trained and scored: a folder with the night's rules, a device, its sandbox and the training rows."""

import contextlib
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from constants import Problem, Settings, sha256_of
from lab.measure.files import file_stamp

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
    out_of_time: Callable[[], bool] = lambda: False  # whether --hours leaves no room for a run
    last_exit: float | None = None  # when the last child ended, by perf_counter
    stamps: dict[str, tuple] = field(default_factory=dict)  # of the data files when they were last read in full

    @property
    def tier(self) -> str:
        return self.sandbox.tier if self.sandbox else "none"

    @property
    def rows(self) -> Path:
        """The training rows, as linked or copied for this night."""
        return self.folder / "text" / self.settings.train_file

    def data_file(self, name: str) -> Path:
        """Where a data file is read: the training rows from the night's own link or copy, if it has one."""
        return self.rows if name == self.rows.name and self.rows.exists() else Path(self.settings.data) / name

    def check_unchanged(self) -> None:
        """Raises Problem if harness or data are no longer what the night began with.

        Data are read in full once in each start, later if size, inode or times differ.
        """
        harness, another = self.folder / "harness", "changed during the night; start another night with --tag NEW"
        for path in (*(harness / name for name in HARNESS), *map(self.data_file, self.settings.data_sha256)):
            if not path.is_file():
                raise Problem(
                    f"{path} is gone; restore it (data: python prepare.py), or start another night with --tag NEW"
                )
        for name, expected in self.settings.harness_sha256.items():
            if sha256_of(harness / name) != expected:
                raise Problem(f"{harness / name} {another}")
        if Settings.of((harness / "night.json").read_text()) != self.settings:
            raise Problem(f"{harness / 'night.json'} {another}")
        for name, expected in self.settings.data_sha256.items():
            path = self.data_file(name)
            stamp = file_stamp(path)
            if stamp is None or (stamp != self.stamps.get(name) and sha256_of(path) != expected):
                raise Problem(f"{Path(self.settings.data) / name} {another}")
            self.stamps[name] = stamp

    def linked_again(self) -> None:
        """Takes note that a link to the rows was made or removed, which changes one of their times and nothing else."""
        stamp, known = file_stamp(self.rows), self.stamps.get(self.rows.name)
        if stamp and known and stamp[:-1] == known[:-1]:
            self.stamps[self.rows.name] = stamp

    @contextlib.contextmanager
    def linking(self):
        """Around making or removing a link: what had changed before is not taken for the doing of the link."""
        unchanged = file_stamp(self.rows) == self.stamps.get(self.rows.name)
        yield
        if unchanged:
            self.linked_again()
