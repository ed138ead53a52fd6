"""stream: real pipes into a real ffmpeg, real signals, steering from files and stdin, refusals."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.errors import AaptError, BundleError, InputError, OutputError, UsageError
from aapt_deploy.models.aapt.prompts import parse, token_ids
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.starts import all_starts, start
from aapt_deploy.stream import stream as streams
from aapt_deploy.stream.session import GRACE_S
from aapt_deploy.stream.stream import Request, Streamed, frame_count, stream
from aapt_deploy.video.formats import PIPE_FORMATS
from aapt_deploy.video.pictures import write_image
from aapt_deploy.video.sinks import ReaderGone, Sink
from tests.support.bundles import rewrite_manifest
from tests.support.commands import COMMAND, ENVIRONMENT
from tests.support.ffmpeg import FFMPEG, probed
from tests.support.opening import open_engines, silent
from tests.support.tiny import PROMPTS, picture

BARE_PIXELS = [
    "-f",
    "rawvideo",
    "-pixel_format",
    "rgb24",
    "-video_size",
    "64x32",
    "-framerate",
    "24",
]


def run(
    bundle: Path,
    output: Path | str,
    seconds: float | None = 0.5,
    warnings: list[str] | None = None,
    **more: Any,
) -> Streamed:
    return stream(
        Bundle.open(bundle),
        Request(str(output), seconds=seconds, **more),
        silent if warnings is None else warnings.append,
        silent,
    )


def pixels(path: Path) -> np.ndarray:
    """Frames of a .rgb file: uint8 [T, H, W, 3]."""
    return np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 32, 64, 3)


def refusal(kind: type[AaptError], bundle: Path, output: Path | str, **more: Any) -> str:
    with pytest.raises(kind) as caught:
        run(bundle, output, **more)
    assert caught.value.hint
    return str(caught.value)


def command(bundle: Path, *arguments: object, python: Sequence[str] = ()) -> list[str]:
    return [*COMMAND[:-2], *python, *COMMAND[-2:], "stream", str(bundle), *map(str, arguments)]


@contextlib.contextmanager
def process(
    bundle: Path, *arguments: object, python: Sequence[str] = (), **pipes: Any
) -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(
        command(bundle, *arguments, python=python), env=ENVIRONMENT, stderr=subprocess.PIPE, **pipes
    ) as running:
        try:
            yield running
        finally:
            running.kill()


# --- frames


@pytest.mark.parametrize(
    ("seconds", "frames"), [(0.001, 1), (1 / 24, 1), (2 / 24, 2), (0.5, 12), (1.05, 25)]
)
def test_a_stream_is_as_long_as_asked(
    bundle: Path, tmp_path: Path, seconds: float, frames: int
) -> None:
    done = run(bundle, tmp_path / "a.rgb", seconds)
    assert len(pixels(tmp_path / "a.rgb")) == done.frames == frames
    assert done.seconds == round(frames / 24, 3)
    assert (done.ended, done.signal) == ("done", 0)
    assert frames < 5 or done.fps > 0 < done.first_frame_ms


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    bundle: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(bundle, tmp_path / f"{name}.mp4", 1.0, seed=seed)
    a, b, c = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_both_backends_stream_the_same(bundle: Path, tmp_path: Path, backend: str) -> None:
    run(bundle, tmp_path / "a.rgb", backend=backend)
    run(bundle, tmp_path / "b.rgb")
    assert np.abs(pixels(tmp_path / "a.rgb").astype(int) - pixels(tmp_path / "b.rgb")).max() <= 1


def test_the_precision_can_be_chosen(bundle: Path, tmp_path: Path) -> None:
    run(bundle, tmp_path / "a.rgb", precision="int8")
    run(bundle, tmp_path / "b.rgb", precision="fp32")
    run(bundle, tmp_path / "c.rgb")
    assert not np.array_equal(pixels(tmp_path / "a.rgb"), pixels(tmp_path / "b.rgb"))
    assert np.array_equal(
        pixels(tmp_path / "c.rgb"), pixels(tmp_path / "b.rgb")
    )  # the profile's own


# --- where a stream starts


def test_a_picture_is_what_a_stream_starts_from(
    bundle: Path, image: Path, tmp_path: Path, tiny: Profile
) -> None:
    opened = Bundle.open(bundle)
    begun = start(opened, str(image), "desert at dusk")
    assert begun.image.shape == (32, 64, 3)
    assert np.abs(begun.image.astype(int) - picture(64, 32, 3)).mean() < 8
    assert begun.text is not None
    assert np.array_equal(begun.text, token_ids(parse("desert at dusk")))
    run(bundle, tmp_path / "a.rgb", image=str(image))
    run(bundle, tmp_path / "b.rgb")
    assert not np.array_equal(pixels(tmp_path / "a.rgb")[0], pixels(tmp_path / "b.rgb")[0])


def test_the_start_frame_that_fits_the_prompt_is_taken(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    by_name = {name: start(opened, name, None) for name in PROMPTS}
    assert by_name["woods"].prompt == PROMPTS["woods"]
    for prompt, name in (
        ("a forest", "woods"),
        ("at night", "woods"),
        ("clear", "dunes"),
        (None, "dunes"),
        ("foggy autumn noon", "woods"),
    ):
        assert np.array_equal(start(opened, None, prompt).image, by_name[name].image), prompt
        assert start(opened, None, prompt).prompt == (prompt or PROMPTS["dunes"])
    assert len(all_starts(opened)) == 2


def test_a_prompt_changes_the_look(bundle: Path, tmp_path: Path) -> None:
    for name, prompt in (("a", "desert at noon"), ("b", "desert at night")):
        run(bundle, tmp_path / f"{name}.rgb", image="dunes", prompt=prompt)
    a, b = pixels(tmp_path / "a.rgb"), pixels(tmp_path / "b.rgb")
    assert np.array_equal(a[0], b[0])
    assert not np.array_equal(a[1:], b[1:])


def test_pictures_and_prompts_that_cannot_be_used(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.mp4"
    (tmp_path / "text.png").write_text("no picture")
    write_image(tmp_path / "square.png", picture(64, 64, 0))
    for kind, image, message in (
        (InputError, tmp_path / "text.png", "not a PNG, JPEG or WebP picture"),
        (InputError, tmp_path / "square.png", "is 64x64, which is not the shape"),
        (InputError, tmp_path / "none.png", "No such file"),
        (InputError, tmp_path, "Is a directory"),
        (UsageError, "wodos", "start frame 'wodos' does not exist"),
        (UsageError, "x" * 300, "does not exist"),
        (InputError, tmp_path / ("x" * 300), "File name too long"),
    ):  # fmt: skip
        assert message in refusal(kind, bundle, out, image=str(image))
    assert "prompt word 'klingon' is outside the vocabulary" in refusal(
        UsageError, bundle, out, prompt="klingon desert"
    )
    assert "two values of time" in refusal(UsageError, bundle, out, prompt="dawn, night")
    assert sorted(os.listdir(tmp_path)) == ["square.png", "text.png"]


def test_a_bundle_without_start_frames_asks_for_a_picture_and_streams_from_one(
    copied: Path, image: Path, tmp_path: Path, aapt: Any
) -> None:
    """As `aapt init` makes checkpoints."""
    rewrite_manifest(copied, lambda manifest: manifest.update(start_frames={}))
    ran = aapt("stream", copied, "-o", tmp_path / "x.y4m", "--seconds", 0.5)
    assert ran.code == UsageError.exit_code and ran.error == f"bundle {copied} holds no start frame"
    assert ran.err.splitlines()[-1] == "hint: give it a picture to start from: --image PICTURE"
    assert not (tmp_path / "x.y4m").exists()
    assert (
        aapt("stream", copied, "-o", tmp_path / "x.y4m", "--seconds", 0.5, "--image", image).code
        == 0
    )


def test_a_generator_without_text_takes_no_prompt(
    bundle: Path, tmp_path: Path, tiny: Profile
) -> None:
    opened = Bundle.open(bundle)
    opened.__dict__["profile"] = tiny.replace(text=type(tiny.text)("vocabulary", 0, 16))
    with pytest.raises(UsageError, match="profile tiny-cpu takes no prompt"):
        start(opened, None, "desert")
    assert start(opened, None, None).text is None


# --- what is refused


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 0.0, 1e308])
def test_a_length_that_is_no_length(tiny: Profile, seconds: float) -> None:
    with pytest.raises(UsageError, match="is not a positive length") as caught:
        frame_count(tiny, seconds)
    assert caught.value.exit_code == 2


def test_outputs_that_cannot_work(bundle: Path, tmp_path: Path) -> None:
    assert "there is no folder" in refusal(OutputError, bundle, tmp_path / "none" / "x.mp4")
    (tmp_path / "folder.mp4").mkdir()
    assert "is a folder" in refusal(OutputError, bundle, tmp_path / "folder.mp4")
    assert "names no video format" in refusal(UsageError, bundle, tmp_path / "x.txt")
    assert "No space left on device" in refusal(OutputError, bundle, "/dev/full", format="y4m")
    assert "is an address" in refusal(UsageError, bundle, "rtmp://host/live")
    with pytest.raises(UsageError, match="mp4 cannot go to stdout") as caught:
        run(bundle, "-", format="mp4")
    assert all(name in caught.value.hint for name in PIPE_FORMATS)
    assert os.listdir(tmp_path) == ["folder.mp4"]


def test_an_engine_that_was_not_built_is_named_before_the_output_is_touched(
    bare: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.mp4"
    out.write_bytes(b"older")
    assert "has no onnxruntime engine" in refusal(BundleError, bare, out)
    assert out.read_bytes() == b"older"
    assert sorted(os.listdir(tmp_path)) == ["bare", "x.mp4"]


def test_an_existing_file_survives_a_stream_that_fails_in_the_middle(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dies:
        """The real engines, until the second block."""

        def __init__(self, *arguments: Any) -> None:
            self.engines = open_engines(*arguments)
            self.backend, self.overlapped = self.engines.backend, False
            self.decoded = 0

        @property
        def generator(self) -> Any:
            return self.engines.generator

        def __getitem__(self, graph: str) -> Any:
            return self if graph == "decoder" else self.engines[graph]

        def reset(self) -> None:
            self.engines["decoder"].reset()

        def run(self, **inputs: Any) -> Any:
            self.decoded += 1
            if self.decoded == 3:
                raise BundleError("the engine broke", "build it again")
            return self.engines["decoder"].run(**inputs)

        def close(self) -> None:
            self.engines.close()

    out = tmp_path / "x.mp4"
    out.write_bytes(b"older")
    monkeypatch.setattr(streams, "open_engines", Dies)
    assert "the engine broke" in refusal(BundleError, bundle, out)
    assert out.read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["x.mp4"]


def test_stdout_cannot_hold_frames_and_json(bundle: Path, aapt: Any) -> None:
    ran = aapt("stream", bundle, "-o", "-", "--json")
    assert (ran.code, ran.out) == (2, "")
    assert "--json writes to stdout" in ran.error


# --- a sink of one's own


class Memory(Sink):
    """Keeps what it gets; its reader leaves after `most` frames."""

    def __init__(self, most: int = 1000) -> None:
        self.name, self.frames, self.most, self.ended = "memory", 0, most, ""
        self.blocks: list[np.ndarray] = []

    def write(self, frames: np.ndarray) -> None:
        if self.frames + len(frames) > self.most:
            raise ReaderGone
        self.blocks.append(frames)
        self.frames += len(frames)

    def close(self) -> None:
        self.ended = "closed"

    def abort(self) -> None:
        self.ended = "aborted"


def test_a_stream_takes_any_sink(bundle: Path, tmp_path: Path) -> None:
    sink = Memory()
    done = stream(Bundle.open(bundle), Request("memory", seconds=0.5), silent, silent, sink)
    run(bundle, tmp_path / "a.rgb")
    assert np.array_equal(np.concatenate(sink.blocks), pixels(tmp_path / "a.rgb"))
    assert [len(block) for block in sink.blocks] == [1, 4, 4, 3]
    assert (done.frames, done.output, done.ended, sink.ended) == (12, "memory", "done", "closed")
    assert os.listdir(tmp_path) == ["a.rgb"]


def test_any_sinks_reader_may_leave(bundle: Path) -> None:
    sink = Memory(most=6)
    done = stream(Bundle.open(bundle), Request("memory", seconds=2), silent, silent, sink)
    assert (done.frames, done.ended, sink.ended) == (5, "reader gone", "closed")


def test_any_sink_is_aborted_if_the_engine_is_missing(bare: Path) -> None:
    sink = Memory()
    with pytest.raises(BundleError, match="has no onnxruntime engine"):
        stream(Bundle.open(bare), Request("memory", seconds=2), silent, silent, sink)
    assert sink.ended == "aborted"


# --- controls


def test_controls_from_a_file_steer_and_a_bad_line_is_survived(
    bundle: Path, tmp_path: Path
) -> None:
    flight = tmp_path / "flight.jsonl"
    lines = [
        '{"yaw": 0.3}',
        '{"yaw": ',
        "# a remark",
        '{"prompt": "night"}',
        '{"prompt": "klingon"}',
        '{"sideways": 3}',
        '{"at": 0.9, "forward": 0}',
    ]
    flight.write_text("\n".join(lines))
    warnings: list[str] = []
    done = run(bundle, tmp_path / "a.rgb", 1.5, warnings, controls=str(flight))
    assert done.frames == 36
    assert sorted(w.split(";")[0] for w in warnings) == [
        f"{flight} line 2: not valid JSON: Expecting value at column 9",
        f"{flight} line 6: unknown key 'sideways', "
        "known are forward, strafe, yaw, pitch, prompt, at",
        "prompt word 'klingon' is outside the vocabulary",
    ]
    run(bundle, tmp_path / "b.rgb", 1.5)
    a, b = pixels(tmp_path / "a.rgb"), pixels(tmp_path / "b.rgb")
    assert np.array_equal(a[0], b[0])
    assert not np.array_equal(a[1:5], b[1:5])


def test_a_prompt_by_control_changes_later_frames_only(bundle: Path, tmp_path: Path) -> None:
    flight = tmp_path / "flight.jsonl"
    flight.write_text('{"at": 0.5, "prompt": "night, foggy"}')
    run(bundle, tmp_path / "a.rgb", 1.0, controls=str(flight))
    run(bundle, tmp_path / "b.rgb", 1.0)
    same = [
        np.array_equal(a, b)
        for a, b in zip(pixels(tmp_path / "a.rgb"), pixels(tmp_path / "b.rgb"), strict=True)
    ]
    assert same[:13] == [True] * 13  # the start image and three blocks; the fourth begins at 0.5 s
    assert not any(same[13:])


def test_a_missing_controls_file_is_refused(bundle: Path, tmp_path: Path) -> None:
    assert "No such file" in refusal(
        InputError, bundle, tmp_path / "x.mp4", controls=str(tmp_path / "none.jsonl")
    )
    assert os.listdir(tmp_path) == []


def test_controls_from_stdin(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.rgb"
    with process(
        bundle, "-o", out, "--seconds", 1, "--controls", "-", stdin=subprocess.PIPE
    ) as running:
        _, err = running.communicate(
            b'{"yaw": 0.3}\nnonsense\n{"prompt": "forest at night"}\n', timeout=60
        )
    assert running.returncode == 0, err.decode()
    lines = err.decode().splitlines()
    assert [line for line in lines if line.startswith("warning: ")] == [
        "warning: stdin line 2: not valid JSON: Expecting value at column 1; "
        "the last good value stays"
    ]
    assert len(pixels(out)) == 24
    run(bundle, tmp_path / "plain.rgb", 1.0)
    assert not np.array_equal(pixels(out)[-4:], pixels(tmp_path / "plain.rgb")[-4:])


# --- pipes


@pytest.mark.parametrize("name", PIPE_FORMATS)
def test_a_pipe_into_ffmpeg(bundle: Path, tmp_path: Path, name: str) -> None:
    given = BARE_PIXELS if name == "rawvideo" else []
    with process(
        bundle, "-o", "-", "--format", name, "--seconds", 1.5, stdout=subprocess.PIPE
    ) as running:
        taken = [
            FFMPEG,
            "-v",
            "error",
            *given,
            "-i",
            "-",
            "-fps_mode",
            "passthrough",
            "-c:v",
            "libx264",
            str(tmp_path / "o.mp4"),
        ]
        reader = subprocess.run(
            taken, stdin=running.stdout, stderr=subprocess.PIPE, check=False, timeout=60
        )
        assert running.stderr is not None
        err = running.stderr.read().decode()
        assert (running.wait(30), reader.returncode, reader.stderr) == (0, 0, b""), err
    assert probed(tmp_path / "o.mp4").frames == 36
    assert err.splitlines()[0] == "streaming to stdout"
    assert err.splitlines()[-1].startswith("stdout: 36 frames, 1.5 s of video")


def test_the_same_seed_gives_the_same_bytes_through_a_pipe(bundle: Path) -> None:
    runs = [
        subprocess.run(
            command(bundle, "-o", "-", "--seconds", 0.5),
            env=ENVIRONMENT,
            capture_output=True,
            check=True,
        )
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout
    assert runs[0].stdout.startswith(b"YUV4MPEG2 W64 H32 F24:1")


@pytest.mark.parametrize("name", ["y4m", "mpegts"])
def test_a_reader_that_has_enough_ends_the_stream_quietly(bundle: Path, name: str) -> None:
    with process(bundle, "-o", "-", "--format", name, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert len(running.stdout.read(100_000)) == 100_000
        running.stdout.close()
        err = running.stderr.read().decode()
        assert running.wait(30) == 0
    first, *between, last = err.splitlines()
    assert first == "streaming to stdout"
    assert all("frames" in line and "fps" in line for line in between)
    assert last.startswith("stdout: ")
    assert last.endswith(", the reader left")


def test_a_terminal_gets_no_binary(bundle: Path) -> None:
    leader, follower = pty.openpty()
    with process(bundle, "-o", "-", stdout=follower) as running:
        err = running.communicate(timeout=60)[1].decode()
    os.close(follower)
    with pytest.raises(OSError, match="Input/output error"):  # closed, and nothing was in it
        os.read(leader, 1)
    os.close(leader)
    assert running.returncode == 2
    assert "error: stdout is a terminal" in err
    assert "Traceback" not in err


# --- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("suffix", ["mp4", "y4m"])
def test_a_signal_in_mid_stream_leaves_a_file_that_plays(
    bundle: Path, tmp_path: Path, number: signal.Signals, code: int, suffix: str
) -> None:
    out = tmp_path / f"x.{suffix}"
    with process(bundle, "-o", out, "--realtime", stdout=subprocess.PIPE) as running:
        until = time.monotonic() + 30
        while not (part := tmp_path / f"x.part.{suffix}").exists() or (
            part.stat().st_size == 0 and time.monotonic() < until
        ):
            time.sleep(0.02)
        time.sleep(0.5)
        running.send_signal(number)
        output, err = running.communicate(timeout=60)
    assert (running.returncode, output) == (code, b"")
    assert os.listdir(tmp_path) == [out.name]
    lines = err.decode().splitlines()
    assert "stopped by a signal" in lines[-1]
    assert f"{probed(out).frames} frames" in lines[-1]
    assert not [line for line in lines if line.startswith(("error:", "Traceback", "  File"))]


@pytest.mark.parametrize("delay_ms", [0, 60, 150, 250, 350])
def test_ctrl_c_while_a_stream_starts(bundle: Path, tmp_path: Path, delay_ms: int) -> None:
    """From the first line that a user sees, while modules load and engines open."""
    out = tmp_path / "x.mp4"
    # An interrupt can fall between an open() and its `with`. The process closes the file then, and
    # -W error would report that.
    with process(bundle, "-o", out, python=["-W", "ignore::ResourceWarning"]) as running:
        assert running.stderr is not None
        first = running.stderr.readline()
        time.sleep(delay_ms / 1000)
        running.send_signal(signal.SIGINT)
        err = (first + running.stderr.read()).decode()
        assert running.wait(60) == 130, err
    assert "Traceback" not in err
    assert os.listdir(tmp_path) in ([], ["x.mp4"])
    if out.exists():
        assert probed(out).frames >= 1


def test_one_ctrl_c_ends_a_stream_to_a_pipe_that_nobody_reads(bundle: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for reader in (
        None,
        os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK),
    ):  # it is not even opened; it is, and stalls
        with process(bundle, "-o", tmp_path / "pipe", "--format", "nut") as running:
            assert running.stderr is not None
            assert running.stderr.readline() == f"streaming to {tmp_path / 'pipe'}\n".encode()
            time.sleep(1)
            running.send_signal(signal.SIGINT)
            assert running.wait(GRACE_S + 10) == 130
            assert b"Traceback" not in running.stderr.read()
        if reader is not None:
            os.close(reader)


def test_signals_are_given_back(bundle: Path, tmp_path: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    run(bundle, tmp_path / "x.rgb")
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


# --- what a stream needs


def test_a_stream_imports_neither_torch_nor_onnx(bundle: Path, tmp_path: Path) -> None:
    asked = [
        COMMAND[0],
        "-X",
        "importtime",
        *COMMAND[1:],
        "stream",
        str(bundle),
        "-o",
        str(tmp_path / "x.mp4"),
        "--seconds",
        "0.5",
    ]
    err = subprocess.run(asked, env=ENVIRONMENT, capture_output=True, text=True, check=True).stderr
    imported = {
        line.rsplit("|", 1)[1].strip()
        for line in err.splitlines()
        if line.startswith("import time:")
    }
    assert {"onnxruntime", "av", "numpy"} <= imported
    assert not {name.split(".")[0] for name in imported} & {
        "torch",
        "onnx",
        "onnxscript",
        "tensorrt",
        "sympy",
    }


def test_a_stream_leaves_nothing_in_the_users_home(bundle: Path, tmp_path: Path) -> None:
    """ONNX Runtime would: an id for its telemetry, kept in a database."""
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        name: value for name, value in ENVIRONMENT.items() if name != "ORT_DISABLE_TELEMETRY"
    }
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    subprocess.run(
        command(bundle, "-o", tmp_path / "x.mp4", "--seconds", 0.5),
        env=environment,
        capture_output=True,
        check=True,
    )
    assert list(home.rglob("*")) == []


def test_the_result_as_json(bundle: Path, tmp_path: Path, aapt: Any) -> None:
    ran = aapt("stream", bundle, "-o", tmp_path / "x.mp4", "--seconds", 0.5, "--json")
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert ran.out.count("\n") == 1
    assert (result["frames"], result["ended"], result["output"]) == (
        12,
        "done",
        str(tmp_path / "x.mp4"),
    )
