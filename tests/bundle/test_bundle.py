"""Bundles: damage is refused by name, half-written files never show, one process writes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aapt_deploy.bundle import bundle as bundles
from aapt_deploy.bundle.bundle import FORMAT_VERSION, SEAL, Bundle, create
from aapt_deploy.errors import AaptError, BundleError, BusyError, OutputError
from tests.support.bundles import (
    ENGINE,
    FILES,
    SOURCE,
    add,
    engine_file,
    make,
    rewrite_manifest,
    tree,
)
from tests.support.commands import ENVIRONMENT, Ran
from tests.support.toys import TINY


def refusal(call: Callable[[], object], kind: type[AaptError] = BundleError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.hint
    return str(caught.value)


def child(code: str, path: Path, **options: Any) -> "subprocess.Popen[str]":
    """A second process that runs `code` with the bundle's `path` and tests/support/bundles.py."""
    head = "import os, signal, sys, time, resource\nfrom tests.support.bundles import *\n"
    head += f"from aapt_deploy import errors\npath = Path({str(path)!r})\n"
    pipes: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "stdin": subprocess.PIPE,
        "text": True,
    }
    return subprocess.Popen([sys.executable, "-c", head + code], env=ENVIRONMENT, **pipes | options)


def wait_for(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().strip() == line


def finish(process: "subprocess.Popen[str]") -> tuple[str, str]:
    out, err = process.communicate(timeout=60)
    return out.strip(), err.strip()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bundle"


# --- what a good bundle is ---


def test_a_bundle_gives_back_what_was_put_in(path: Path) -> None:
    made = make(path)
    opened = Bundle.open(path)
    opened.verify()
    assert opened.manifest == made.manifest
    assert opened.profile == TINY
    assert set(opened.manifest["files"]) == {*FILES, "profile.toml", engine_file(opened)}
    assert opened.checked("encoder.onnx").read_bytes().startswith(b"first encoder.onnx")
    assert opened.checked(engine_file(opened)).read_bytes() == b"first" * 1000
    assert os.listdir(path.parent) == ["bundle"]
    assert tree(path) == {
        *opened.manifest["files"],
        "manifest.json",
        ".lock",
        "start",
        "engines",
        f"engines/{ENGINE}",
        f"engines/{ENGINE}/1",
    }


def test_a_bundle_is_made_in_folders_that_do_not_exist_yet(tmp_path: Path) -> None:
    path = tmp_path / "one" / "two" / "bundle"
    make(path).verify()
    assert os.listdir(path.parent) == ["bundle"]
    make(path, overwrite=True).verify()


def test_a_bundle_may_be_moved(path: Path) -> None:
    make(path)
    moved = path.rename(path.with_name("elsewhere"))
    Bundle.open(moved).verify()


def test_a_bundle_is_as_readable_as_any_new_file(path: Path) -> None:
    make(path)
    plain = path.parent / "plain"
    plain.touch()
    for name in ("manifest.json", "profile.toml"):
        assert (path / name).stat().st_mode == plain.stat().st_mode
    assert (
        path.stat().st_mode & 0o777
        == path.parent.joinpath("bundle", "start").stat().st_mode & 0o777
    )


def test_only_the_asked_file_is_read_and_only_once(path: Path) -> None:
    make(path)
    (path / "generator.onnx").write_bytes(b"damaged")
    opened = Bundle.open(path)
    good = opened.checked("encoder.onnx")
    good.write_bytes(b"changed after it was checked")
    assert opened.checked("encoder.onnx") == good
    refusal(lambda: Bundle.open(path).checked("encoder.onnx"))


def test_a_new_engine_replaces_the_old_one_of_its_key_only(path: Path) -> None:
    opened = make(path)
    old = engine_file(opened)
    with opened.add_engine("torch-fp32") as stage:
        stage.entry["backend"] = "torch"
    add(opened, "second")
    assert set(opened.engines) == {ENGINE, "torch-fp32"}
    assert engine_file(opened) != old
    assert not (path / old).exists()
    again = Bundle.open(path)
    assert again.manifest == opened.manifest
    assert again.checked(engine_file(again)).read_bytes() == b"second" * 1000
    again.verify()


def test_engines_that_two_openers_add_in_turn_are_both_kept(path: Path) -> None:
    make(path)
    one, two = Bundle.open(path), Bundle.open(path)
    for opened, key in ((one, "a"), (two, "b")):
        with opened.add_engine(key) as stage:
            (stage.path / "plan").write_text(key)
    assert {"a", "b", ENGINE} == set(Bundle.open(path).engines)
    Bundle.open(path).verify()


def test_doctor_checks_every_file_of_a_bundle(path: Path, aapt: Callable[..., Ran]) -> None:
    opened = make(path)
    count = len(opened.manifest["files"])
    good = aapt("doctor", path, "--json")
    record = json.loads(good.out)
    engines = record.pop("engines")
    assert good.code == 0 and record == {"bundle": str(path), "files": count}
    assert [engine["name"] for engine in engines] == ["onnxruntime-fp32"]
    assert good.err.splitlines()[0] == f"{count} files, all whole"
    name = [*opened.manifest["files"]][-1]
    (path / name).write_bytes(b"damaged")
    bad = aapt("doctor", path)
    assert (bad.code, bad.out) == (4, "") and name in bad.error
    assert aapt("doctor", path, "--tensorrt").code == 2


# --- what is not a bundle ---


def test_a_path_without_a_bundle_is_refused(path: Path) -> None:
    assert refusal(lambda: Bundle.open(path)) == f"bundle {path} is not a directory"
    path.write_text("a file")
    assert "is not a directory" in refusal(lambda: Bundle.open(path))
    assert "File name too long" in refusal(lambda: Bundle.open(path.with_name("x" * 300)))
    path.unlink()
    path.mkdir()
    assert refusal(lambda: Bundle.open(path)) == f"bundle {path} has no manifest.json: not a bundle"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b'"text"',
        b"\xff\xfe\x00",
        b"{}",
        b"[" * 100_000,
        b'{"format_version": 1}',
    ],
)
def test_a_manifest_that_is_no_manifest_is_damaged(path: Path, content: bytes) -> None:
    make(path)
    (path / "manifest.json").write_bytes(content)
    assert refusal(lambda: Bundle.open(path)).startswith(
        f"bundle manifest {path}/manifest.json is damaged: "
    )


def test_a_manifest_of_absurd_size_is_not_read(path: Path) -> None:
    make(path)
    os.truncate(path / "manifest.json", 1 << 40)  # sparse: it takes no room
    assert "is damaged: 1099511627776 bytes long" in refusal(lambda: Bundle.open(path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format_version", "1"), ("format_version", None), ("profile", 3), ("files", []),
        ("files", {"a": 3}), ("files", {"a": {"bytes": 1}}),
        ("files", {"a": {"bytes": True, "sha256": "0" * 64}}),
        ("files", {"a": {"bytes": 1, "sha256": "0" * 63}}),
        ("files", {"a": {"bytes": 1, "sha256": 0}}), ("engines", []), ("engines", {"a": 3}),
        ("start_frames", []), ("start_frames", {"a": 3}),
        ("precision", ["fp8"]), ("source", None), ("source", {}), ("source", {"sha256": 3}),
        ("source", {"sha256": "0" * 63}),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_named(path: Path, key: str, value: object) -> None:
    make(path)
    rewrite_manifest(path, lambda manifest: manifest.update({key: value}))
    message = refusal(lambda: Bundle.open(path))
    assert "is damaged: wrong type of " in message
    assert repr(key) in message or "'a'" in message


@pytest.mark.parametrize("key", ["format_version", "files", "engines", "source", SEAL])
def test_a_missing_key_is_named(path: Path, key: str) -> None:
    make(path)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest[key]
    if key != SEAL:
        manifest[SEAL] = bundles._seal({k: v for k, v in manifest.items() if k != SEAL})
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert f"is damaged: no '{key}'" in refusal(lambda: Bundle.open(path))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"name = '\xff'", "'utf-8' codec can't decode byte 0xff"),
        (b"name = 3", "'name' = 3 must be str"),
        (b"name = ", "not valid TOML"),
    ],
)
def test_a_profile_that_cannot_be_used_is_the_bundles_fault_though_its_hash_fits(
    path: Path, text: bytes, reason: str
) -> None:
    make(path)
    (path / "profile.toml").write_bytes(text)
    rewrite_manifest(
        path,
        lambda manifest: manifest["files"].update(
            {"profile.toml": bundles._describe(path / "profile.toml")}
        ),
    )
    with pytest.raises(
        BundleError, match=f"^bundle {path} has a profile.toml that cannot be used: "
    ) as caught:
        _ = Bundle.open(path).profile
    assert reason in str(caught.value)
    assert caught.value.hint.endswith(f"aapt export CKPT -o {path} --force")


def test_a_newer_format_says_upgrade(path: Path) -> None:
    make(path)
    (path / "manifest.json").write_text(
        json.dumps({"format_version": FORMAT_VERSION + 1, "content": "of a shape unknown here"})
    )
    with pytest.raises(
        BundleError, match=f"has format {FORMAT_VERSION + 1}, this aapt knows {FORMAT_VERSION}"
    ) as caught:
        Bundle.open(path)
    assert "upgrade" in caught.value.hint


# --- damage ---


@pytest.mark.parametrize("where", [0, 0.5, -1])
@pytest.mark.parametrize("name", [*FILES, "profile.toml", f"engines/{ENGINE}/1/generator.onnx"])
def test_one_flipped_bit_is_found(path: Path, name: str, where: float) -> None:
    make(path)
    content = bytearray((path / name).read_bytes())
    content[int(where * len(content)) if where >= 0 else -1] ^= 1
    (path / name).write_bytes(content)
    opened = Bundle.open(path)
    message = refusal(lambda: opened.checked(name))
    assert f"bundle file {path / name} does not match the manifest (sha256 " in message
    assert refusal(opened.verify) == message
    if name == "profile.toml":
        assert refusal(lambda: opened.profile) == message


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(path: Path) -> None:
    make(path)
    manifest = path / "manifest.json"
    content = manifest.read_bytes()
    for at in range(0, len(content), 7):
        for bit in (0, 5):
            flipped = content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
            manifest.write_bytes(flipped)
            try:
                same = json.loads(flipped) == json.loads(
                    content
                )  # between the values, a space may become another blank
            except ValueError:
                same = False
            if not same:
                refusal(lambda: Bundle.open(path))


def test_a_file_cut_short_lost_or_unlisted_is_named(path: Path) -> None:
    opened = make(path)
    os.truncate(path / "encoder.onnx", 10)
    assert f"{path}/encoder.onnx does not match the manifest (bytes 10 instead of 9" in refusal(
        lambda: opened.checked("encoder.onnx")
    )
    (path / "generator.onnx").unlink()
    assert f"{path}/generator.onnx is missing" in refusal(lambda: opened.checked("generator.onnx"))
    (path / "surplus.onnx").touch()
    assert (
        refusal(lambda: opened.checked("surplus.onnx"))
        == f"bundle {path} does not list 'surplus.onnx'"
    )


def test_files_that_cannot_be_read_are_named_with_the_systems_reason(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = make(path)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(bundles, "_describe", refuse)
        assert refusal(lambda: opened.checked("encoder.onnx")) == (
            f"bundle file {path}/encoder.onnx cannot be read: Permission denied"
        )
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert refusal(lambda: Bundle.open(path)) == (
        f"bundle manifest {path}/manifest.json cannot be read: Permission denied"
    )


def test_an_engine_is_not_written_through_a_link_that_leads_out(path: Path) -> None:
    opened, elsewhere = make(path), path.with_name("elsewhere")
    elsewhere.mkdir()
    (path / "engines" / "torch-fp32").symlink_to(elsewhere)
    with pytest.raises(BundleError) as caught, opened.add_engine("torch-fp32"):
        pytest.fail("the engine is being made")
    assert str(caught.value) == f"bundle folder {path}/engines/torch-fp32 leads out of the bundle"
    assert caught.value.hint == bundles.STRANGER and list(elsewhere.iterdir()) == []


def test_a_listed_file_has_its_size(path: Path) -> None:
    opened = make(path)
    assert opened.listed_bytes("encoder.onnx") == (path / "encoder.onnx").stat().st_size
    assert opened.listed_bytes("nothing.onnx") == 0
    assert opened.verify() == len(opened.manifest["files"])


def test_a_stage_knows_the_size_of_all_its_files(path: Path) -> None:
    with make(path).add_engine("torch-fp32") as stage:
        assert stage.size == 0 and stage.relative == "engines/torch-fp32/1"
        (stage.path / "deep").mkdir()
        (stage.path / "a").write_bytes(b"x" * 5)
        (stage.path / "deep" / "b").write_bytes(b"x" * 7)
        assert stage.size == 12
    opened = Bundle.open(path)
    assert opened.listed_bytes("engines/torch-fp32/1/deep/b") == 7
    with opened.add_engine("torch-fp32") as stage:
        assert stage.relative == "engines/torch-fp32/2"


def test_a_damaged_engine_is_built_again_and_a_damaged_graph_exported_again(path: Path) -> None:
    opened = make(path)
    with opened.add_engine("tensorrt-fp8") as stage:
        (stage.path / "decoder.plan").write_bytes(b"plan")
    commands = {
        engine_file(opened): f"aapt build-engine {path} --backend onnxruntime --precision fp32",
        "engines/tensorrt-fp8/1/decoder.plan": (
            f"aapt build-engine {path} --backend tensorrt --precision fp8"
        ),
        "encoder.onnx": f"aapt export CKPT -o {path} --force",
    }
    for name, command in commands.items():
        (path / name).write_bytes(b"")
        with pytest.raises(BundleError) as caught:
            opened.checked(name)
        assert caught.value.hint.endswith(f"with: {command}")


def test_a_folder_or_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(path: Path) -> None:
    opened = make(path)
    for make_odd in (os.mkdir, os.mkfifo):
        (path / "encoder.onnx").unlink()
        make_odd(path / "encoder.onnx")
        assert "is missing or leads out" in refusal(lambda: opened.checked("encoder.onnx"))
        if make_odd is os.mkdir:
            (path / "encoder.onnx").rmdir()
            (path / "encoder.onnx").touch()


# --- leading out of the bundle ---


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "start/../../secret", "..", "", "a\\..\\b", "nul\0byte"]
)
def test_a_manifest_that_names_what_is_outside_is_refused_before_anything_is_read(
    path: Path, name: str
) -> None:
    make(path)
    (path.parent / "secret").write_bytes(b"secret")
    entry = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    rewrite_manifest(path, lambda manifest: manifest["files"].update({name: entry}))
    assert "outside the bundle" in refusal(lambda: Bundle.open(path))


def test_a_link_out_of_the_bundle_is_refused_though_its_hash_fits(path: Path) -> None:
    opened = make(path)
    (path / "encoder.onnx").rename(path.parent / "moved.onnx")
    (path / "encoder.onnx").symlink_to("../moved.onnx")
    assert "leads out of the bundle" in refusal(lambda: opened.checked("encoder.onnx"))
    (path / "encoder.onnx").unlink()
    (path / "encoder.onnx").symlink_to("encoder.onnx")  # to itself
    assert "is missing" in refusal(lambda: opened.checked("encoder.onnx"))


def test_a_linked_folder_is_refused(path: Path) -> None:
    opened = make(path)
    (path / "start").rename(path.parent / "start")
    (path / "start").symlink_to(path.parent / "start")
    assert "leads out of the bundle" in refusal(lambda: opened.checked("start/hills.png"))


def test_no_link_makes_add_engine_write_or_delete_outside(path: Path) -> None:
    opened = make(path)
    outside = path.parent / "outside"
    (outside / ENGINE / "1").mkdir(parents=True)
    (outside / "precious").write_text("kept")
    (path / ".lock").unlink()
    (path / ".lock").symlink_to(outside / "precious")
    refusal(lambda: add(opened, "second"), OutputError)
    (path / ".lock").unlink()
    (path / ".manifest.json.new").symlink_to(outside / "precious")
    add(opened, "second")
    (path / "engines").rename(path.parent / "engines")
    (path / "engines").symlink_to(outside)
    assert "leads out of the bundle" in refusal(lambda: add(opened, "third"))
    assert (outside / "precious").read_text() == "kept"
    assert tree(outside) == {"precious", ENGINE, f"{ENGINE}/1"}


# --- making and replacing ---


def test_what_exists_is_not_replaced_unasked_and_never_when_it_is_no_bundle(path: Path) -> None:
    make(path)
    assert refusal(lambda: make(path, "second"), OutputError) == f"bundle {path} exists"
    for occupied in (path.with_name("folder"), path.with_name("file")):
        if occupied.name == "folder":
            occupied.mkdir()
        else:
            occupied.write_text("precious")
        assert "is not a bundle; it is left as it is" in refusal(
            lambda there=occupied: make(there, overwrite=True), OutputError
        )
    assert sorted(os.listdir(path.parent)) == ["bundle", "file", "folder"]
    assert Bundle.open(path).manifest["mark"] == "first"


def test_an_asked_replacement_replaces_all_of_it(path: Path) -> None:
    make(path)
    with create(path, TINY, overwrite=True) as draft:
        draft.manifest |= {"mark": "second", "source": SOURCE}
    opened = Bundle.open(path)
    assert opened.manifest["mark"] == "second"
    assert tree(path) == {"profile.toml", "manifest.json"}
    assert os.listdir(path.parent) == ["bundle"]


def test_a_bundle_behind_a_link_is_replaced_where_it_is(path: Path) -> None:
    make(path)
    link = path.with_name("link")
    link.symlink_to(path)
    make(link, "second", overwrite=True)
    assert link.is_symlink()
    assert Bundle.open(path).manifest["mark"] == "second"


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt(), BundleError("…")], ids=repr)
@pytest.mark.parametrize("existing", [False, True])
def test_an_error_or_ctrl_c_leaves_nothing_half_written(
    path: Path, error: BaseException, existing: bool
) -> None:
    if existing:
        make(path)
    before = tree(path.parent)
    # The error comes in the middle of the work.
    with pytest.raises(type(error)), create(path, TINY, overwrite=True) as draft:  # noqa: PT012
        (draft.path / "encoder.onnx").write_bytes(b"half")
        raise error
    assert tree(path.parent) == before
    if existing:
        opened = Bundle.open(path)
        # As above.
        with pytest.raises(type(error)), opened.add_engine("torch-fp32") as stage:  # noqa: PT012
            (stage.path / "plan").write_bytes(b"half")
            raise error
        assert tree(path.parent) == before
        assert Bundle.open(path).manifest == opened.manifest
        opened.verify()


def test_a_path_that_appears_in_the_meantime_is_not_overwritten(path: Path) -> None:
    def race() -> None:
        with create(path, TINY):
            path.mkdir()
            (path / "precious").touch()

    assert "is not a bundle; it is left as it is" in refusal(race, OutputError)
    assert os.listdir(path.parent) == ["bundle"]
    assert os.listdir(path) == ["precious"]


def test_a_place_that_cannot_be_written_is_an_output_error(path: Path) -> None:
    path.write_text("a file")
    assert "cannot be written: Not a directory" in refusal(
        lambda: make(path / "below"), OutputError
    )
    assert "cannot be written: File name too long" in refusal(
        lambda: make(path.with_name("x" * 250)), OutputError
    )
    if Path("/proc/self").exists():  # a folder that takes no new one, not even from root
        assert (
            refusal(lambda: make(Path("/proc/bundle")), OutputError)
            == "bundle /proc/bundle cannot be written: No such file or directory"
        )


def test_readers_never_see_a_moment_without_a_bundle(path: Path) -> None:
    make(path)
    reader = child(
        "print('ready', flush=True)\n"
        "while not (path.parent / 'stop').exists(): Bundle.open(path)\nprint('done')",
        path,
    )
    wait_for(reader, "ready")
    for _ in range(30):
        with create(path, TINY, overwrite=True) as draft:
            draft.manifest["source"] = SOURCE
    (path.parent / "stop").touch()
    assert finish(reader) == ("done", "")


# --- two processes, and processes that die ---

HOLD_ENGINE = """
with Bundle.open(path).add_engine("torch-fp32") as stage:
    (stage.path / "plan").write_bytes(b"half")
    print("busy", flush=True)
    sys.stdin.read()
"""
HOLD_CREATE = """
with create(path, TINY, overwrite=True) as draft:
    (draft.path / "encoder.onnx").write_bytes(b"half")
    draft.manifest |= {"mark": "child", "source": SOURCE}
    print("busy", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("hold", [HOLD_ENGINE, HOLD_CREATE])
def test_a_second_writer_is_told_at_once_who_is_at_work(path: Path, hold: str) -> None:
    make(path)
    holder = child(hold, path)
    wait_for(holder, "busy")
    with pytest.raises(
        BusyError, match=f"^bundle {path} is being written by process {holder.pid}$"
    ) as caught:
        add(Bundle.open(path), "second")
    assert caught.value.exit_code == 7
    assert str(holder.pid) in refusal(lambda: make(path, "second", overwrite=True), BusyError)
    Bundle.open(path).verify()  # readers are not kept out
    assert finish(holder) == ("", "")
    add(Bundle.open(path), "third")
    Bundle.open(path).verify()
    assert os.listdir(path.parent) == ["bundle"]


def test_two_exports_to_one_new_place_do_not_mix(path: Path) -> None:
    holder = child(HOLD_CREATE, path)
    wait_for(holder, "busy")
    assert str(holder.pid) in refusal(lambda: make(path), BusyError)
    assert ".bundle.unfinished is what an export that was stopped, or still runs" in refusal(
        lambda: Bundle.open(path)
    )
    assert finish(holder) == ("", "")
    assert Bundle.open(path).manifest["mark"] == "child"


@pytest.mark.parametrize("hold", [HOLD_ENGINE, HOLD_CREATE])
def test_a_killed_writer_leaves_the_old_bundle_valid_and_the_next_one_cleans_up(
    path: Path, hold: str
) -> None:
    before = make(path).manifest
    holder = child(hold, path)
    wait_for(holder, "busy")
    holder.kill()
    finish(holder)
    assert holder.returncode == -signal.SIGKILL
    opened = Bundle.open(path)
    assert opened.manifest == before
    opened.verify()
    add(opened, "second")
    assert not list(path.glob(".stage-*"))
    make(path, "third", overwrite=True).verify()
    assert os.listdir(path.parent) == ["bundle"]


def test_a_killed_first_export_leaves_its_traces_named_and_the_next_one_succeeds(
    path: Path,
) -> None:
    holder = child(HOLD_CREATE, path)
    wait_for(holder, "busy")
    holder.kill()
    finish(holder)
    left = path.parent / ".bundle.unfinished"
    assert str(left) in refusal(lambda: Bundle.open(path))
    assert "has no manifest.json" in refusal(lambda: Bundle.open(left / "new"))
    make(path).verify()
    assert os.listdir(path.parent) == ["bundle"]


def test_a_bundle_moved_aside_by_a_killed_export_comes_back(path: Path) -> None:
    """There is a moment between two renames; this is the state that a kill leaves in it."""
    kill = "rename = Path.rename\n"
    kill += "def renamed(self, to):\n    rename(self, to)\n"
    kill += "    os.kill(os.getpid(), signal.SIGKILL)\n"
    kill += "Path.rename = renamed\n"
    make(path)
    killed = child(kill + "with create(path, TINY, overwrite=True): pass", path)
    finish(killed)
    assert killed.returncode == -signal.SIGKILL
    assert "is not a directory; " in refusal(lambda: Bundle.open(path))

    def fail() -> None:
        with create(path, TINY, overwrite=True):
            raise BundleError("export failed", "…")

    assert refusal(fail) == "export failed"
    opened = Bundle.open(path)
    assert opened.manifest["mark"] == "first"
    opened.verify()
    assert os.listdir(path.parent) == ["bundle"]


@pytest.mark.parametrize("step", range(1, 25))
def test_add_engine_killed_at_any_system_call_leaves_a_valid_bundle(path: Path, step: int) -> None:
    """The audit hook sees the second build's file operations; the process dies at the `step`-th."""
    hook = (
        "count = 0\ndef hook(event, args):\n    global count\n"
        "    if event in ('open', 'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.unlink', "
        "'os.scandir'):\n"
        "        count += 1\n"
        f"        if count == {step}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "opened = Bundle.open(path)\nsys.addaudithook(hook)\nadd(opened, 'second')\nprint(count)"
    )
    make(path)
    process = child(hook, path)
    out, _ = finish(process)
    opened = Bundle.open(path)
    opened.verify()
    content = opened.checked(engine_file(opened)).read_bytes()
    assert content in (b"first" * 1000, b"second" * 1000)
    if process.returncode != -signal.SIGKILL:
        assert int(out) < step
        assert content == b"second" * 1000
    add(opened, "third")
    assert tree(path / "engines") == {
        ENGINE,
        *(f"{ENGINE}/{p}" for p in tree(path / "engines" / ENGINE)),
    }
    assert len(os.listdir(path / "engines" / ENGINE)) == 1
    assert not list(path.glob(".stage-*"))


# --- a full disk ---

LIMIT = "resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes}, {bytes}))\n"
REPORT = (
    "try:\n    {work}\nexcept errors.OutputError as error:\n"
    "    print(error, error.exit_code, bool(error.hint))"
)


@pytest.mark.parametrize("bytes_left", [0, 500, 5000])
@pytest.mark.parametrize(
    "work", ["make(path, 'second', overwrite=True)", "add(Bundle.open(path), 'second' * 10)"]
)
def test_no_room_is_an_output_error_and_the_old_bundle_stays(
    path: Path, work: str, bytes_left: int
) -> None:
    """A limit on file sizes refuses a write in its middle, as a full disk does: any file's."""
    before = make(path).manifest
    out, err = finish(child(LIMIT.format(bytes=bytes_left) + REPORT.format(work=work), path))
    assert (out, err) == (f"bundle {path} cannot be written: File too large 6 True", "")
    opened = Bundle.open(path)
    assert opened.manifest == before
    opened.verify()
    assert os.listdir(path.parent) == ["bundle"]
    assert not list(path.glob(".stage-*"))
    assert not list(path.glob(".manifest*"))


def test_no_room_for_the_manifest_alone_keeps_the_old_engine(path: Path) -> None:
    opened = make(path)
    room = (path / "manifest.json").stat().st_size - 200
    work = "\n".join(
        [
            "with Bundle.open(path).add_engine('torch-fp32') as stage:",
            "        (stage.path / 'plan').write_bytes(b'x' * 100)",
        ]
    )
    out, err = finish(child(LIMIT.format(bytes=room) + REPORT.format(work=work), path))
    assert (out, err) == (f"bundle {path} cannot be written: File too large 6 True", "")
    assert Bundle.open(path).manifest == opened.manifest
    opened.verify()
    assert not list(path.glob(".manifest*"))
    assert tree(path / "engines") == {
        ENGINE,
        f"{ENGINE}/1",
        f"{ENGINE}/1/generator.onnx",
        "torch-fp32",
    }
