"""One writer at a time, and files that are there whole or not at all."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from aapt_deploy.bundle import files
from aapt_deploy.bundle.files import LOCK, locked, refuse_irregular, whole, writing
from aapt_deploy.errors import BusyError, OutputError


def enter(folder: Path) -> None:
    with locked(folder, "the folder"):
        pass


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    with locked(tmp_path, "the folder"):
        assert (tmp_path / LOCK).read_text() == str(os.getpid())
        message = f"the folder is being written by process {os.getpid()}"
        with pytest.raises(BusyError, match=message) as caught:
            enter(tmp_path)
        assert "wait until it is done" in caught.value.hint
    enter(tmp_path)


def test_a_holder_without_a_number_is_another_process(tmp_path: Path) -> None:
    with locked(tmp_path, "it"):
        (tmp_path / LOCK).write_text("somebody")
        with pytest.raises(BusyError, match="the folder is being written by another process"):
            enter(tmp_path)


@pytest.mark.parametrize("again", [False, True])
def test_a_lock_that_its_holder_has_just_removed_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Between our open and our flock the file may go, and another process may make a new one.

    Then two would write.
    """
    real = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        (tmp_path / LOCK).unlink()
        if again:
            (tmp_path / LOCK).touch()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(BusyError):
        enter(tmp_path)


def test_the_text_of_a_longer_number_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("1" * 30)
    with locked(tmp_path, "it"):
        assert (tmp_path / LOCK).read_text() == str(os.getpid())


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        enter(tmp_path)
    assert (tmp_path / "precious").read_text() == "kept"


def test_no_descriptor_is_left_by_a_lock_that_is_held_or_refused(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with locked(tmp_path, "it"), pytest.raises(BusyError):
        enter(tmp_path)
    assert os.listdir("/proc/self/fd") == before


class Refused(Exception):
    """What a library raises in the place of OSError."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left"), "No space left"),
        (OSError("odd"), "odd"),
        (Refused("broken"), "broken"),
    ],
)
def test_a_refusal_to_write_becomes_one_error_with_its_hint(error: Exception, said: str) -> None:
    message = f"^the file cannot be written: {said}$"
    with (
        pytest.raises(OutputError, match=message) as caught,
        writing("the file", "free some space", Refused),
    ):
        raise error
    assert caught.value.hint == "free some space"
    with pytest.raises(Refused), writing("the file", ""):
        raise Refused


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_a_file_must_not_replace_is_refused_also_behind_a_link(
    tmp_path: Path, kind: str
) -> None:
    there = {"folder": tmp_path / "there", "pipe": tmp_path / "there", "device": Path(os.devnull)}[
        kind
    ]
    if kind == "folder":
        there.mkdir()
    elif kind == "pipe":
        os.mkfifo(there)
    (tmp_path / "link").symlink_to(there)
    for path in (there, tmp_path / "link"):
        with pytest.raises(OutputError, match="is not a regular file"):
            refuse_irregular(path)
        with pytest.raises(OutputError), whole(path):
            raise AssertionError("not reached")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for path in (tmp_path / "dangling", tmp_path / "new"):
        refuse_irregular(path)


def test_a_whole_file_takes_its_place_at_the_end_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    os.chmod(path, 0o600)
    before = os.umask(0o027)
    try:
        with whole(path) as temporary:
            assert temporary.parent == tmp_path and temporary.name.startswith(".file.")
            temporary.unlink()  # a writer may make the file anew
            temporary.write_text("new")
            temporary.chmod(0o777)
            assert path.read_text() == "old"
    finally:
        os.umask(before)
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_file_that_is_not_finished_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    # The error comes in the middle of the work.
    with pytest.raises(error), whole(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_long_name_leaves_room_for_its_temporary_s(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    with whole(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole"


def test_behind_a_link_the_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other" / "target")
    with whole(tmp_path / "link") as temporary:
        assert temporary.parent == tmp_path / "other"
        temporary.write_text("whole")
    assert (tmp_path / "link").is_symlink() and (
        tmp_path / "other" / "target"
    ).read_text() == "whole"


@pytest.mark.parametrize(
    ("content", "free"),
    [
        ("MemTotal:  9 kB\nMemFree: 7 kB\nMemAvailable:   1234 kB\nCached: 5 kB\n", 1234 * 1024),
        (None, 50 * 4096), ("MemFree: 7 kB\n", 50 * 4096), ("MemAvailable: much\n", 50 * 4096),
    ],
)  # fmt: skip
def test_free_memory_is_what_the_system_calls_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, free: int
) -> None:
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(files, "Path", {"/proc/meminfo": meminfo}.__getitem__)
    monkeypatch.setattr(
        files.os, "sysconf", {"SC_AVPHYS_PAGES": 50, "SC_PAGE_SIZE": 4096}.__getitem__
    )
    if content is not None:
        meminfo.write_text(content)
    assert files.free_memory_bytes() == free
