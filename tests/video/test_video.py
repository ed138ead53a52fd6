"""Frames out, checked by the real ffmpeg, and pictures and videos in.

Formats, colours, pipes that close, full disks, Ctrl-C.
"""

import contextlib
import itertools
import os
import shlex
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from aapt_deploy.errors import InputError, MachineError, OutputError, UsageError
from aapt_deploy.video import formats
from aapt_deploy.video.formats import FORMATS, PIPE_FORMATS
from aapt_deploy.video.pictures import read_image, read_video, write_image
from aapt_deploy.video.sinks import ReaderGone, Sink, open_sink
from tests.support.ffmpeg import FFMPEG, ffmpeg, probed

WIDTH, HEIGHT, FPS = 192, 112, 24
FORMAT_NAMES = sorted(FORMATS)


def clip(count: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A moving picture with fine detail: uint8 [T, H, W, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    frames = [
        np.stack([(x + 3 * t) % 256, (2 * y + t) % 256, (x + y) % 256], -1) for t in range(count)
    ]
    noise = np.random.default_rng(0).integers(0, 12, (count, height, width, 3))
    return np.minimum(np.stack(frames) + noise, 255).astype(np.uint8)


def input_options(name: str, size: tuple[int, int] = (WIDTH, HEIGHT)) -> list[str]:
    """What ffmpeg must be told about a source of format `name`: nothing, except for bare pixels."""
    bare = [
        "-f",
        "rawvideo",
        "-pixel_format",
        "rgb24",
        "-video_size",
        "{}x{}".format(*size),
        "-framerate",
        str(FPS),
    ]
    return bare if name == "rawvideo" else []


def decoded(name: str, source: str | bytes, size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    """The frames that ffmpeg finds in a file (path) or a stream (bytes): uint8 [T, H, W, 3]."""
    path, data = (source, None) if isinstance(source, str) else ("-", source)
    output = ["-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    pixels = ffmpeg(*input_options(name, size), "-i", path, *output, data=data)
    return np.frombuffer(pixels, np.uint8).reshape(-1, size[1], size[0], 3)


def written(path: Path, name: str, frames: np.ndarray, step: int = 4) -> bytes:
    with open_sink(str(path), name, frames.shape[2], frames.shape[1], FPS) as sink:
        for start in range(0, len(frames), step):
            sink.write(frames[start : start + step])
    return path.read_bytes()


def sender(body: str, *arguments: str, **options: object) -> subprocess.Popen[bytes]:
    """Run `body` in a process that has `open_sink`, frames of 192x112 and its arguments."""
    head = (
        "import sys, time, numpy as np\n"
        "from aapt_deploy.video.sinks import open_sink, ReaderGone\n"
        "from aapt_deploy.errors import AaptError\n"
        "rng = np.random.default_rng(0)\n"
        "frames = rng.integers(0, 255, (4, 112, 192, 3), dtype=np.uint8)\n"
        "arguments = sys.argv[1:]\n"
    )
    command = [sys.executable, "-c", head + body, *arguments]
    return subprocess.Popen(command, **options)  # type: ignore[call-overload,no-any-return]


# --- formats, to a file and to stdout


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_every_format_makes_a_file_whose_frames_ffmpeg_counts(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.bin"
    written(path, name, clip(52))
    found = probed(path, *input_options(name))
    assert (found.frames, found.width, found.height, found.fps) == (52, 192, 112, "24")
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("name", PIPE_FORMATS)
def test_every_pipe_format_goes_through_stdout_into_ffmpeg(name: str) -> None:
    body = f"with open_sink('-', {name!r}, 192, 112, 24) as sink:\n"
    body += "    [sink.write(frames) for _ in range(13)]\n"
    with sender(body, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as source:
        output = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
        pixels = ffmpeg(*input_options(name), "-i", "-", *output, data=source.communicate()[0])
    assert source.returncode == 0
    assert len(pixels) == 52 * WIDTH * HEIGHT * 3


def test_a_shell_pipe_into_ffmpeg_makes_a_playable_file(tmp_path: Path) -> None:
    body = "with open_sink('-', None, 192, 112, 24) as sink:\n"
    body += "    [sink.write(frames) for _ in range(6)]\n"
    with sender(body, stdout=subprocess.PIPE) as source:
        assert source.stdout is not None
        command = [FFMPEG, "-v", "error", "-i", "-", str(tmp_path / "o.mp4")]
        subprocess.run(command, stdin=source.stdout, check=True, timeout=60)
    found = probed(tmp_path / "o.mp4")
    assert (found.frames, found.pixels) == (24, "yuv420p")


@pytest.mark.parametrize("name", PIPE_FORMATS)
def test_a_pipe_has_each_frame_as_soon_as_it_is_written(tmp_path: Path, name: str) -> None:
    for size in ((WIDTH, HEIGHT), (64, 32)):
        through_a_pipe(tmp_path / f"pipe-{size[0]}", name, size)


def through_a_pipe(path: Path, name: str, size: tuple[int, int]) -> None:
    """Write eight frames, and decode what a reader has before the sink is closed."""
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    frames = clip(8, *size)
    with open_sink(str(path), name, *size, FPS) as sink:
        arrived, sizes = b"", []
        for frame in frames:
            drain = _Drain(reader)
            sink.write(frame[None])
            arrived += drain.stop()
            sizes.append(len(arrived))
        shown = len(decoded(name, arrived, size))
        late = (
            1 if name in ("mkv", "fmp4") else 0
        )  # a cluster or fragment is only sent off by the frame behind it
        assert shown >= len(frames) - late
        assert all(b > a for a, b in itertools.pairwise(sizes))
        drain = _Drain(reader)
    drain.stop()
    os.close(reader)


class _Drain:
    """Reads a pipe while a frame that may be larger than the pipe's buffer is written to it."""

    def __init__(self, fd: int) -> None:
        self.fd, self.data, self.last = fd, b"", False
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while True:
            last = self.last
            with contextlib.suppress(BlockingIOError):
                while data := os.read(self.fd, 1 << 16):
                    self.data += data
            if last:
                return
            time.sleep(0.001)

    def stop(self) -> bytes:
        self.last = True
        self.thread.join()
        return self.data


COLOURS = [
    (255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128), (200, 30, 120), (0, 0, 0),
    (255, 255, 255),
]  # fmt: skip


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_colours_come_back(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"a.{name}"
    exact = FORMATS[name].pixels == "rgb24"
    for colour in COLOURS:
        written(path, name, np.broadcast_to(np.array(colour, np.uint8), (5, HEIGHT, WIDTH, 3)))
        back = decoded(name, str(path)).astype(int)
        assert len(back) == 5
        assert np.abs(back - colour).max() <= (0 if exact else 3), colour


@pytest.mark.parametrize(
    "name", [name for name in FORMAT_NAMES if FORMATS[name].codec == "libx264"]
)
def test_h264_is_tagged_bt709_limited(tmp_path: Path, name: str) -> None:
    written(tmp_path / "a", name, clip(5))
    found = probed(tmp_path / "a")
    # One "bt709" stands for space, primaries and transfer: ffmpeg names three where they differ.
    assert (found.pixels, found.colour) == ("yuv420p", ("tv", "bt709", "progressive"))


def test_large_y4m_is_bt709_because_players_assume_that(tmp_path: Path) -> None:
    data = written(
        tmp_path / "a.y4m",
        "y4m",
        np.broadcast_to(np.array([255, 0, 0], np.uint8), (1, 720, 1280, 3)),
    )
    luma = data[data.index(b"FRAME\n") + 6]
    assert luma == 63  # BT.709 red; BT.601 has 81


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_the_same_frames_give_the_same_bytes(tmp_path: Path, name: str) -> None:
    sizes = ((192, 112), (64, 32), (336, 208))  # 192x112 was once random on every run
    clips = [clip(40, *size) for size in sizes]
    first = [written(tmp_path / "a", name, frames) for frames in clips]
    assert min(map(len, first)) > 1000
    time.sleep(1)  # dates have a second's grain
    for step in (1, 2, 3, 4):
        for frames, wanted in zip(clips, first, strict=True):
            assert written(tmp_path / "b", name, frames, step) == wanted, (frames.shape, step)


def test_frames_of_any_memory_layout_are_written_as_they_look(tmp_path: Path) -> None:
    frames = clip(3)
    turned = frames[:, ::-1, ::-1]  # negative strides
    assert written(tmp_path / "a.rgb", "rawvideo", turned) == turned.tobytes()


def test_a_closed_mp4_is_an_ordinary_one(tmp_path: Path) -> None:
    written(tmp_path / "a.mp4", "mp4", clip(52))
    with av.open(str(tmp_path / "a.mp4")) as container:  # both figures are from its index
        stream = container.streams.video[0]
        assert (stream.frames, stream.duration * stream.time_base) == (52, Fraction(52, 24))


def test_quality_of_a_file(tmp_path: Path) -> None:
    frames = clip(24)
    for name in ("mp4", "mkv"):
        path = tmp_path / f"a.{name}"
        written(path, name, frames)
        back = decoded(name, str(path))
        luma_error = (back.astype(float).mean(-1) - frames.astype(float).mean(-1)).std()
        assert 10 * np.log10(255**2 / luma_error**2) > 36, name


# --- which format, and where it can go


@pytest.mark.parametrize(
    ("output", "start"),
    [
        ("a.mp4", b"\0\0\0"),
        ("a.MKV", b"\x1aE\xdf\xa3"),
        ("a.matroska", b"\x1aE\xdf\xa3"),
        ("a.y4m", b"YUV4MPEG2"),
        ("a.nut", b"nut/multimedia"),
        ("a.ts", b"\x47"),
        ("a.mpegts", b"\x47"),
        ("a.fmp4", b"\0\0\0"),
    ],
)
def test_the_suffix_names_the_format(tmp_path: Path, output: str, start: bytes) -> None:
    with open_sink(str(tmp_path / output), None, WIDTH, HEIGHT, FPS) as sink:
        sink.write(clip(2))
    assert (tmp_path / output).read_bytes().startswith(start)


@pytest.mark.parametrize("output", ["a.rgb", "a.rawvideo", "a.b.RGB"])
def test_raw_frames_are_bare_rgb24(tmp_path: Path, output: str) -> None:
    frames = clip(2)
    with open_sink(str(tmp_path / output), None, WIDTH, HEIGHT, FPS) as sink:
        sink.write(frames)
    assert (tmp_path / output).read_bytes() == frames.tobytes()


@pytest.mark.parametrize(
    ("output", "name", "message", "hint"),
    [
        ("a.avi", None, "'.avi' names no video format", "mpegts"),
        ("a", None, "names no video format", "y4m"),
        ("a.mp4", "divx", "'divx' is not known", "rawvideo"),
        ("-", "mp4", "cannot go to stdout", "y4m, nut, mpegts, fmp4, rawvideo"),
        ("/dev/null", "mp4", "cannot go to /dev/null", "fragmented mp4"),
        ("udp://127.0.0.1:9/x.ts", None, "is an address", "ffmpeg -i - -c copy"),
    ],
)
def test_a_choice_that_cannot_work_is_refused(
    output: str, name: str | None, message: str, hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        open_sink(output, name, WIDTH, HEIGHT, FPS)
    assert message in str(caught.value)
    assert hint in caught.value.hint


def test_a_build_without_the_encoder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "mkv", formats.Format("matroska", "no_such_encoder", "yuv420p"))
    with pytest.raises(MachineError, match="no_such_encoder"):
        open_sink(str(tmp_path / "a.mkv"), None, WIDTH, HEIGHT, FPS)
    assert os.listdir(tmp_path) == []


def test_odd_sizes_are_refused_where_colours_are_halved(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="63x32") as caught:
        open_sink(str(tmp_path / "a.mp4"), None, 63, 32, FPS)
    assert caught.value.hint == "take nut or rawvideo, or a profile of even size"
    frames = clip(2, 63, 31)
    assert written(tmp_path / "a.rgb", "rawvideo", frames) == frames.tobytes()


def test_a_terminal_gets_no_bytes() -> None:
    body = "try: open_sink('-', None, 192, 112, 24)\n"
    body += "except AaptError as e: print(e, e.hint, file=sys.stderr); sys.exit(e.exit_code)\n"
    leader, follower = os.openpty()
    with sender(body, stdout=follower, stderr=subprocess.PIPE) as process:
        message = process.communicate(timeout=60)[1].decode()
    os.close(follower)
    os.set_blocking(leader, False)
    with pytest.raises((OSError, BlockingIOError)):
        os.read(leader, 1)  # nothing arrived
    os.close(leader)
    assert process.returncode == 2
    assert "stdout is a terminal" in message
    assert "-o" in message


# --- places that cannot be written


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="name too long"):
        open_sink(str(tmp_path / f"{'x' * 300}.mkv"), None, 64, 32, 24)


def test_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="there is no folder") as missing:
        open_sink(str(tmp_path / "no" / "a.mp4"), None, WIDTH, HEIGHT, FPS)
    assert "mkdir -p" in missing.value.hint
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        open_sink(str(tmp_path / "a.mp4"), None, WIDTH, HEIGHT, FPS)
    (tmp_path / "file").write_bytes(b"")
    for below in (tmp_path / "file" / "a.mp4", tmp_path / "file" / "no" / "a.mp4"):
        with pytest.raises(OutputError, match="file is not a folder") as blocked:
            open_sink(str(below), None, WIDTH, HEIGHT, FPS)
        assert "mkdir" not in blocked.value.hint
    for name in (None, "mp4"):
        with pytest.raises(UsageError, match="the name of the output is empty"):
            open_sink("", name, WIDTH, HEIGHT, FPS)


@pytest.mark.skipif(
    not os.path.isdir("/proc/self"), reason="needs /proc, where not even root can make files"
)
def test_a_folder_that_cannot_be_written() -> None:
    with pytest.raises(OutputError, match=r"/proc/a\.mp4: cannot be written"):
        open_sink("/proc/a.mp4", None, WIDTH, HEIGHT, FPS)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", PIPE_FORMATS)
def test_a_full_disk_is_said_with_the_path(name: str) -> None:
    sink = open_sink("/dev/full", name, WIDTH, HEIGHT, FPS)
    with pytest.raises(OutputError, match="/dev/full: cannot be written: No space left"):
        sink.write(clip(50))
    sink.close()  # said once


FILLED_UP = """
import os, resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (0, 700, 100_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        with open_sink(arguments[0], arguments[1], 192, 112, 24) as sink:
            [sink.write(frames) for _ in range(30)]
    except AaptError as e:
        print(type(e).__name__, e.exit_code, e, file=sys.stderr)
    left = os.listdir(os.path.dirname(arguments[0]))
    print(open(arguments[0], "rb").read(), left, file=sys.stderr)
"""


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path: Path, name: str) -> None:
    """A real write error, by the file size limit.

    It comes at the first byte, in the header or at close, and in the middle.
    """
    path = tmp_path / "a.video"
    path.write_bytes(b"old")
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    with sender(FILLED_UP, str(path), name, stderr=subprocess.PIPE, env=environment) as process:
        message = process.communicate(timeout=60)[1].decode()
    told = [f"OutputError 6 {path}: cannot be written: File too large", "b'old' ['a.video']"]
    assert (process.returncode, message.splitlines()) == (0, 3 * told)


# --- readers that leave


@pytest.mark.parametrize("name", PIPE_FORMATS)
def test_a_reader_that_leaves_ends_the_stream_quietly(name: str) -> None:
    body = (
        "try:\n"
        "    with open_sink('-', arguments[0], 192, 112, 24) as sink:\n"
        "        while True: sink.write(frames)\n"
        "except ReaderGone as e: print(e, file=sys.stderr)\n"
    )
    with sender(body, name, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        got = process.stdout.read(1 << 20)
        process.stdout.close()
        message = process.stderr.read().decode()
        assert process.wait(60) == 0
    assert len(got) == 1 << 20
    assert message == "the reader of stdout is gone\n"  # that, and no noise from Python or FFmpeg


def test_a_reader_that_leaves_before_the_end_is_seen_at_close() -> None:
    body = (
        "sink = open_sink('-', 'mkv', 192, 112, 24)\n"
        "sink.write(frames)\n"
        "print('written', file=sys.stderr, flush=True)\n"
        "sys.stdin.read()\n"
        "try: sink.close()\nexcept ReaderGone: print('gone', file=sys.stderr)\nsink.close()\n"
    )
    with sender(
        body, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stderr.readline() == b"written\n"
        process.stdout.close()
        process.stdin.close()
        assert (process.stderr.read(), process.wait(60)) == (b"gone\n", 0)


def test_a_stdout_that_does_not_block_loses_nothing() -> None:
    body = "import os\nos.set_blocking(1, False)\n"
    body += "with open_sink('-', 'rawvideo', 192, 112, 24) as sink:\n"
    body += "    [sink.write(frames) for _ in range(10)]\n"
    with sender(body, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        time.sleep(0.5)  # the pipe is full by now
        assert len(process.stdout.read()) == 40 * WIDTH * HEIGHT * 3
    assert process.returncode == 0


def test_stdout_that_is_closed_is_refused() -> None:
    body = "try: open_sink('-', None, 192, 112, 24)\n"
    body += "except AaptError as e: print(type(e).__name__, e, file=sys.stderr)\n"
    with sender(
        body, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1)
    ) as process:
        assert process.communicate(timeout=60)[1] == b"OutputError stdout is closed\n"


# --- how a file ends


ENDLESS = (
    "try:\n"
    "    with open_sink(arguments[0], arguments[1], 192, 112, 24) as sink:\n"
    "        print('open', flush=True)\n"
    "        while True:\n"
    "            sink.write(frames); time.sleep(0.002)\n"
    "            if sink.frames == 12: print('going', flush=True)\n"
    "except KeyboardInterrupt: print(sink.frames, flush=True); sys.exit(130)\n"
)


@pytest.mark.parametrize("name", ["mp4", "mkv", "mpegts", "y4m"])
def test_ctrl_c_leaves_a_whole_file(tmp_path: Path, name: str) -> None:
    for delay_ms in (0, 3, 17, 41):
        path = tmp_path / f"{delay_ms}.{name}"
        with sender(
            ENDLESS, str(path), name, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert [process.stdout.readline() for _ in range(2)] == [b"open\n", b"going\n"]
            time.sleep(delay_ms / 1000)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (130, b"")
        assert probed(path).frames == int(out)
    assert sorted(os.listdir(tmp_path)) == sorted(f"{delay}.{name}" for delay in (0, 3, 17, 41))


def test_ctrl_c_while_the_reader_stalls_is_obeyed() -> None:
    body = (
        "try:\n"
        "    with open_sink('-', 'nut', 192, 112, 24) as sink:\n"
        "        while True: sink.write(frames)\n"
        "except KeyboardInterrupt: sys.exit(130)\n"
    )
    with sender(body, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1000)
        time.sleep(0.3)  # the pipe is full, the sender sits in write
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr is not None
        assert process.stderr.read() == b""


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_a_frame_is_finished_before_a_signal_handler_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: type[BaseException]
) -> None:
    """Whatever the signal and whatever its handler raises: the sink knows of neither."""

    def handler(number: int, frame: object) -> None:
        raise ending

    sink = open_sink(str(tmp_path / "a.mkv"), None, WIDTH, HEIGHT, FPS)
    encode = sink._encoder.write

    def interrupted(pixels: np.ndarray) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.1)  # the main thread has it long before the frame is whole
        encode(pixels)

    monkeypatch.setattr(sink._encoder, "write", interrupted)
    old = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(ending):
            sink.write(clip(3))
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert sink.frames == 1
    sink.close()
    assert probed(tmp_path / "a.mkv").frames == 1
    assert os.listdir(tmp_path) == ["a.mkv"]


@pytest.mark.parametrize("name", ["mp4", "y4m"])
def test_a_file_that_is_being_closed_is_closed_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def handler(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    sink = open_sink(str(tmp_path / f"a.{name}"), None, WIDTH, HEIGHT, FPS)
    sink.write(clip(5))
    finish = sink._encoder.finish

    def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.1)
        finish()

    monkeypatch.setattr(sink._encoder, "finish", interrupted)
    old = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            sink.close()
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert probed(tmp_path / f"a.{name}").frames == 5
    assert os.listdir(tmp_path) == [f"a.{name}"]


class Kept(Sink):
    """A destination of one's own: memory."""

    def __init__(self) -> None:
        self.name, self.frames, self.ended = "memory", 0, ""

    def write(self, frames: np.ndarray) -> None:
        self.frames += len(frames)

    def close(self) -> None:
        self.ended = "closed"

    def abort(self) -> None:
        self.ended = "aborted"


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (None, "closed"), (KeyboardInterrupt(), "closed"), (SystemExit(143), "closed"),
        (ReaderGone(), "closed"), (OSError(), "aborted"), (AssertionError(), "aborted"),
    ],
)  # fmt: skip
def test_how_a_sink_ends(error: BaseException | None, ended: str) -> None:
    sink = Kept()
    with contextlib.suppress(BaseException), sink as entered:
        assert entered is sink
        sink.write(clip(2))
        if error:
            raise error
    assert (sink.frames, sink.ended) == (2, ended)


@pytest.mark.parametrize(("name", "least"), [("mp4", 24), ("mkv", 24), ("mpegts", 24), ("nut", 90)])
def test_a_killed_stream_leaves_the_old_file_and_a_part_that_plays(
    tmp_path: Path, name: str, least: int
) -> None:
    path = tmp_path / f"a.{name}"
    path.write_bytes(b"old")
    body = "sink = open_sink(arguments[0], None, 192, 112, 24)\n"
    body += "[sink.write(frames) for _ in range(24)]\nprint('96', flush=True)\ntime.sleep(60)\n"
    with sender(body, str(path), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"96\n"
        process.kill()
    assert path.read_bytes() == b"old"
    assert probed(tmp_path / f"a.part.{name}").frames >= least
    written(path, name, clip(2))  # the next stream leaves that part alone
    assert sorted(os.listdir(tmp_path)) == [f"a.{name}", f"a.part.{name}"]


def test_a_stream_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    def fail() -> None:
        with open_sink(str(path), None, WIDTH, HEIGHT, FPS) as sink:
            sink.write(clip(4))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_a_stream_without_a_frame_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with open_sink(str(path), None, WIDTH, HEIGHT, FPS):
        pass
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_two_streams_to_one_name_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with (
        open_sink(str(path), None, WIDTH, HEIGHT, FPS) as one,
        open_sink(str(path), None, WIDTH, HEIGHT, FPS) as two,
    ):
        one.write(clip(5))
        two.write(clip(9))
    assert probed(path).frames == 5  # the one that closed last
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_a_link_stays_a_link_and_permissions_follow_the_umask(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "a.mkv").symlink_to(tmp_path / "real" / "b.mkv")
    before = os.umask(0o027)
    try:
        written(tmp_path / "a.mkv", "mkv", clip(2))
    finally:
        os.umask(before)
    assert (tmp_path / "a.mkv").is_symlink()
    assert (tmp_path / "real" / "b.mkv").stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path / "real") == ["b.mkv"]


def test_closing_twice_is_harmless_and_leaks_no_descriptor(tmp_path: Path) -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    before = os.listdir("/proc/self/fd")
    for name in FORMAT_NAMES:
        sink = open_sink(str(tmp_path / "a"), name, WIDTH, HEIGHT, FPS)
        sink.write(clip(1))
        sink.close()
        sink.close()
        sink.abort()  # too late to take a finished file away
        assert (tmp_path / "a").stat().st_size > 100
        open_sink(str(tmp_path / "a"), name, WIDTH, HEIGHT, FPS).abort()
    assert os.listdir("/proc/self/fd") == before


# --- pictures in


@pytest.fixture
def picture(tmp_path: Path) -> Callable[[str, int, int], tuple[Path, np.ndarray]]:
    """Make a smooth picture file by suffix and size; return its path and its pixels."""

    def make(name: str, width: int, height: int) -> tuple[Path, np.ndarray]:
        y, x = np.mgrid[0:height, 0:width]
        pixels = np.stack(
            [x * 255 / width, y * 255 / height, 128 + 60 * np.sin((x + y) * 8 / width)], -1
        ).astype(np.uint8)
        path = tmp_path / name
        form = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
        quality = "90" if name.endswith("webp") else "2"
        ffmpeg(*form, "-i", "-", "-q:v", quality, str(path), data=pixels.tobytes())
        return path, pixels

    return make


Picture = Callable[[str, int, int], tuple[Path, np.ndarray]]


@pytest.mark.parametrize(
    ("name", "error"), [("a.png", 0), ("a.jpg", 4), ("a.webp", 5), ("odd name %03d 'x'.png", 0)]
)
def test_a_picture_of_the_right_size_is_read_as_it_is(
    picture: Picture, tmp_path: Path, name: str, error: float
) -> None:
    path, pixels = picture("made" + Path(name).suffix, WIDTH, HEIGHT)
    path.rename(tmp_path / name)
    got = read_image(str(tmp_path / name), WIDTH, HEIGHT)
    assert got.shape == (HEIGHT, WIDTH, 3)
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous
    assert np.abs(got.astype(int) - pixels).mean() <= error


@pytest.mark.parametrize("size", [(1920, 1120), (384, 224), (96, 56), (193, 112)])
def test_a_picture_of_the_right_shape_is_resized(picture: Picture, size: tuple[int, int]) -> None:
    expected = picture("b.png", WIDTH, HEIGHT)[1]
    got = read_image(str(picture("a.png", *size)[0]), WIDTH, HEIGHT)
    assert got.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(got.astype(int) - expected).mean() < 2.5


def test_a_picture_of_another_shape_is_refused_with_a_command_that_works(
    picture: Picture, tmp_path: Path
) -> None:
    path, _ = picture("a.png", 300, 300)
    odd = path.rename(tmp_path / "it's square.png")
    with pytest.raises(InputError, match=r"300x300.*192x112") as caught:
        read_image(str(odd), WIDTH, HEIGHT)
    program, *arguments = shlex.split(caught.value.hint.split(": ", 1)[1])
    assert program == "ffmpeg"
    subprocess.run(
        [FFMPEG, *arguments],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    assert read_image(str(tmp_path / "start.png"), WIDTH, HEIGHT).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_picture_that_is_cut_off_is_refused(picture: Picture, suffix: str) -> None:
    path, _ = picture(f"a.{suffix}", WIDTH, HEIGHT)
    data = path.read_bytes()
    for keep in (0.0, 0.03, 0.5, 0.9):
        path.write_bytes(data[: int(len(data) * keep)])
        with pytest.raises(InputError, match=f"a.{suffix}"):
            read_image(str(path), WIDTH, HEIGHT)


@pytest.mark.parametrize(
    "data",
    [
        b"hello, I am a text\n" * 99,
        b"",
        b"\0" * 5000,
        b"RIFF\0\0\0\0WAVE" * 9,
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a" * 50,
    ],
)
def test_a_file_that_is_no_picture_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.png"):
        read_image(str(tmp_path / "a.png"), WIDTH, HEIGHT)


@pytest.mark.parametrize("name", ["missing.png", "."])
def test_a_picture_that_cannot_be_opened(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="image"):
        read_image(str(tmp_path / name), WIDTH, HEIGHT)


def test_a_picture_taken_with_a_tilted_phone_is_turned_upright(picture: Picture) -> None:
    path, pixels = picture("a.jpg", HEIGHT, WIDTH)  # 112x192, lying down
    # One entry: orientation 6, turn right to view.
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    data = path.read_bytes()
    path.write_bytes(data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:])
    got = read_image(str(path), WIDTH, HEIGHT)
    assert np.abs(got.astype(int) - np.rot90(pixels, -1)).mean() < 4


def test_a_picture_too_large_to_hold_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", 12_000, 12_000, 1, 0, 0, 0, 0)  # 144 megapixels in 18 kB
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(12_000 * 1501), 9))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(data)
    with pytest.raises(InputError, match="larger than 100,000,000 pixels"):
        read_image(str(tmp_path / "bomb.png"), WIDTH, HEIGHT)


@pytest.mark.parametrize("size", [(WIDTH, HEIGHT), (63, 31), (1, 1)])
def test_a_picture_comes_back_as_written(tmp_path: Path, size: tuple[int, int]) -> None:
    frame = clip(1, *size)[0]
    write_image(str(tmp_path / "a.png"), frame[::-1])
    assert np.array_equal(read_image(str(tmp_path / "a.png"), *size), frame[::-1])


def test_writing_a_picture_nowhere(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"):
        write_image(str(tmp_path / "no" / "a.png"), clip(1)[0])


# --- videos in


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of video at 30 fps in several containers. Frame n has brightness 8 + 4n."""
    folder = tmp_path_factory.mktemp("videos")
    gray = np.repeat((8 + 4 * np.arange(60, dtype=np.uint8))[:, None], 96 * 96 * 3, axis=1)
    form = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "96x96", "-r", "30", "-i", "-"]
    for name, options in [
        ("h264.mp4", ["-c:v", "libx264", "-crf", "1", "-bf", "2"]),
        ("mpeg4.avi", ["-c:v", "mpeg4", "-q:v", "1"]),
        ("vp9.webm", ["-c:v", "libvpx-vp9", "-lossless", "1"]),
        ("h264.ts", ["-c:v", "libx264", "-crf", "1"]),
    ]:
        ffmpeg(*form, *options, "-pix_fmt", "yuv420p", str(folder / name), data=gray.tobytes())
    return folder


@pytest.mark.parametrize("name", ["h264.mp4", "mpeg4.avi", "vp9.webm", "h264.ts"])
def test_videos_are_read_at_the_wanted_rate(videos: Path, name: str) -> None:
    for fps in (30, 24, 15, 60):
        frames = list(read_video(str(videos / name), 32, 16, fps))
        assert len(frames) == 2 * fps
        assert frames[0].shape == (16, 32, 3)
        assert frames[0].dtype == np.uint8
        # Which of the 60 source frames is shown; 0.25 is one grey level.
        source = (np.array([frame.mean() for frame in frames]) - 8) / 4
        wanted = np.minimum(np.arange(2 * fps) * 30 / fps, 59)
        assert np.abs(source - wanted).max() <= 0.5 + 0.25  # the nearest one, and rounding in YUV
        assert abs((source - np.rint(source)).mean()) < 0.1  # neither darker nor brighter


def test_a_video_is_cut_at_the_centre_and_keeps_its_colours(tmp_path: Path) -> None:
    frame = np.zeros((1, 120, 200, 3), np.uint8)
    frame[:, :, 50:150] = (255, 0, 0)  # the middle square, 100 wide, is red; 120 are shown
    with open_sink(str(tmp_path / "a.mp4"), None, 200, 120, FPS) as sink:
        sink.write(np.repeat(frame, 6, axis=0))
    frames = list(read_video(str(tmp_path / "a.mp4"), 60, 60, FPS))
    assert len(frames) == 6
    assert np.abs(frames[3][:, 8:52].astype(int) - (255, 0, 0)).max() <= 2  # BT.709 in, BT.709 out
    assert frames[3][:, :3].max() < 30
    assert frames[3][:, -3:].max() < 30


def test_a_video_with_wide_pixels_is_shown_in_its_true_shape(tmp_path: Path) -> None:
    path = str(tmp_path / "a.mkv")
    source = "testsrc2=s=64x64:r=24:d=0.5,setsar=2/1"
    ffmpeg("-f", "lavfi", "-i", source, "-c:v", "libx264", "-crf", "5", path)
    whole = next(read_video(path, 128, 64, FPS))
    form = ["-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    reference = ffmpeg("-i", path, "-vf", "scale=128:64", *form)
    assert (
        np.abs(whole.astype(int) - np.frombuffer(reference, np.uint8).reshape(64, 128, 3)).mean()
        < 8
    )


@pytest.mark.parametrize("name", ["h264.mp4", "mpeg4.avi", "h264.ts"])
def test_a_damaged_video_is_refused(videos: Path, tmp_path: Path, name: str) -> None:
    data = bytearray((videos / name).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = (
        np.random.default_rng(0).integers(0, 256, 3000, dtype=np.uint8).tobytes()
    )
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=name):
        list(read_video(str(tmp_path / name), 32, 16, FPS))


def test_files_that_are_no_video_are_refused(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no video\n" * 400)
    (tmp_path / "cut.mp4").write_bytes((videos / "h264.mp4").read_bytes()[:2000])
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.2", str(tmp_path / "sound.wav"))
    for name in ("empty.mp4", "text.mp4", "cut.mp4", "sound.wav", "missing.mp4", "."):
        with pytest.raises(InputError, match="video"):
            list(read_video(str(tmp_path / name), 32, 16, FPS))


def test_the_table_is_whole() -> None:
    assert set(PIPE_FORMATS) == set(FORMATS) - {"mp4"}
    assert formats.DEFAULT_PIPE_FORMAT in PIPE_FORMATS
    aliases = [alias for key, chosen in FORMATS.items() for alias in (key, *chosen.names)]
    assert len(aliases) == len(set(aliases))
