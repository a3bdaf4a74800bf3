"""Files that a child may have made: copied, counted and deleted whatever they are."""

import contextlib
import os
import shutil
import stat
import subprocess
from pathlib import Path

from constants import FULL, Problem
from lab.records import RUN_AGAIN

DISK_FLOOR_BYTES = 2**30  # no run starts with less free space: its weights and compile cache have to fit
LEAST_FILES = 10_000  # that its file system must take besides
OUT_BYTES = 8 * 2**30  # all that a child may leave in its folder
MAX_DEPTH = 50  # folders within folders: nobody nests deeper but to break what walks through them


def copy_regular_files(source: Path, target: Path, most_bytes: int, most_files: int = 100_000) -> None:
    """Copies the regular files under `source` into `target`, up to the limits; a child may have made anything of `source`.

    It may also change it meanwhile: each name is opened once, without following a link or waiting for a pipe, and what was opened decides.
    """

    def copy(name, into: Path, depth: int, folder: int | None = None) -> None:
        nonlocal most_bytes, most_files
        try:
            opened = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        except OSError:
            return  # a link, or gone
        try:
            info = os.fstat(opened)
            if stat.S_ISDIR(info.st_mode) and depth <= MAX_DEPTH:
                into.mkdir(exist_ok=True)
                for inner in os.listdir(opened):
                    copy(inner, into / inner, depth + 1, opened)
            elif stat.S_ISREG(info.st_mode):
                left, most_bytes, most_files = info.st_size, most_bytes - info.st_size, most_files - 1
                if most_bytes < 0 or most_files < 0:
                    return
                with open(into, "wb") as file:
                    while left > 0 and (block := os.read(opened, min(left, 1 << 20))):  # it may grow meanwhile
                        file.write(block)
                        left -= len(block)
        except OSError as error:
            unless_full(error)  # else a path longer than paths may be
        finally:
            os.close(opened)

    target.mkdir(parents=True, exist_ok=True)
    copy(source, target, 0)


def unless_full(error: OSError) -> None:
    """Raises the error again if the disk is full: the rest is a child's doing, and no reason to stop."""
    if error.errno in FULL:
        raise error


def names_within(folder: Path):
    """The files under a folder by their names from there, however a child nested it; links are not followed."""
    start = len(str(folder)) + 1
    for place, folders, names in os.walk(folder):
        if place.count(os.sep) - str(folder).count(os.sep) > MAX_DEPTH:
            folders.clear()
        yield from (os.path.join(place, name)[start:] for name in names)


def folder_bytes(folder: Path) -> int:
    """Bytes on disk of all files under a folder; those that vanish meanwhile are not counted."""
    total = 0
    for name in names_within(folder):
        with contextlib.suppress(OSError):
            total += os.lstat(f"{folder}/{name}").st_blocks * 512
    return total


def remove(path: Path) -> None:
    """Deletes a file or a folder, whatever a child made of it: closed to us, or nested deeper than Python walks."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    with contextlib.suppress(RecursionError):
        shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        for command in (["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
            subprocess.run([*command, "--", str(path)], capture_output=True)


def make_run_folder(folder: Path) -> None:
    """The folder of a child, empty: out/ and cache/, to which it may write, and text/."""
    remove(folder)
    for name in ("out", "cache/tmp", "text"):
        (folder / name).mkdir(parents=True)


def free_bytes(folder: Path) -> int:
    """Free bytes of the folder's disk; 0 if it takes hardly another file, however empty."""
    disk = os.statvfs(folder)
    return 0 if disk.f_files and disk.f_favail < LEAST_FILES else disk.f_bavail * disk.f_frsize


def check_disk(folder: Path) -> None:
    """Raises Problem if less than DISK_FLOOR_BYTES are free."""
    free = free_bytes(folder)
    if free < DISK_FLOOR_BYTES:
        few = "" if free else " (or hardly another file is taken: df -i)"
        raise Problem(
            f"{free / 2**20:,.0f} MB are free in {folder}{few} and a run needs {DISK_FLOOR_BYTES / 2**20:,.0f}; free "
            f"space, {RUN_AGAIN}"
        )


def packed(folder: Path, names) -> dict[str, bytes]:
    """The regular files of these names; a child may have made anything of them."""

    def without_links(path, flags):
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)

    files = {}
    for name in names:
        with contextlib.suppress(OSError), open(f"{folder}/{name}", "rb", opener=without_links) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                files[name] = file.read()
    return files


def unpack(files: dict[str, bytes], folder: Path) -> None:
    """Makes the folder anew, whole or not at all; what has a longer path than paths may be is left out."""
    fresh = folder.with_suffix(".new")
    remove(fresh)
    fresh.mkdir(parents=True)
    for name, raw in files.items():
        try:
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_bytes(raw)
        except OSError as error:
            unless_full(error)
    remove(folder)
    os.replace(fresh, folder)
