"""Steering: good lines, bad lines, and a stdin that stalls, ends or floods."""

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aapt_deploy.errors import InputError
from aapt_deploy.models.aapt.camera import CRUISE, LIMITS, Velocity
from aapt_deploy.stream.controls import Control, Controls, open_controls

BLOCK_S = 4 / 24


def drive(path: Path, text: str | bytes, blocks: int) -> tuple[list[Control], list[str]]:
    """The controls of `blocks` blocks steered by a file that holds `text`, and the warnings."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    warnings: list[str] = []
    controls = open_controls(str(path), CRUISE, LIMITS, warnings.append)
    got = [controls.at(block, block * BLOCK_S) for block in range(blocks)]
    controls.close()
    return got, warnings


def wait_for(controls: Controls, wanted: Callable[[Control], bool]) -> Control:
    """Ask block after block until a control arrives; fails after 10 s."""
    end = time.monotonic() + 10
    block = 0
    while time.monotonic() < end:
        block += 1
        if wanted(control := controls.at(block, block * BLOCK_S)):
            return control
        time.sleep(0.005)
    raise AssertionError(f"never arrived; last: {control}")


def test_without_a_source_the_default_holds() -> None:
    controls = open_controls(None, CRUISE, LIMITS, pytest.fail)
    assert [controls.at(block, block * BLOCK_S) for block in range(3)] == [
        Control(CRUISE, None)
    ] * 3
    controls.close()


def test_a_file_gives_one_line_per_block_and_keeps_the_last(tmp_path: Path) -> None:
    text = '# a flight\n{"forward": 10, "yaw": -0.1}\n\n   \n{"strafe": 2}\n'
    text += '{"prompt": "night"}\n{}\n{"yaw": 0}\n'
    got, warnings = drive(tmp_path / "c.jsonl", text, 7)
    steps = [
        Velocity(10, 0, -0.1),
        Velocity(10, 2, -0.1),
        Velocity(10, 2, -0.1),
        Velocity(10, 2, -0.1),
    ] + [Velocity(10, 2, 0)] * 3
    assert [control.velocity for control in got] == steps
    assert [control.prompt for control in got] == [
        None,
        None,
        "night",
        "night",
        "night",
        "night",
        "night",
    ]
    assert warnings == []


def test_a_block_that_is_asked_for_twice_takes_no_second_line(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"forward": 1}\n{"forward": 2}\n')
    controls = open_controls(str(path), CRUISE, LIMITS, pytest.fail)
    assert [controls.at(block, 0).velocity.forward for block in (0, 0, 1, 1)] == [1, 1, 2, 2]


def test_at_waits_for_stream_time(tmp_path: Path) -> None:
    lines = [
        {"forward": 1, "at": 0},
        {"yaw": 0.1, "at": 2 * BLOCK_S},
        {"yaw": 0.2, "at": 2 * BLOCK_S},
        {"forward": 3, "at": 3.5 * BLOCK_S},
        {"pitch": 0.1},
    ]
    got, warnings = drive(
        tmp_path / "c.jsonl", "\n".join(map(json.dumps, lines)), 6
    )  # no newline at the end of the file
    expected = [Velocity(1), Velocity(1), Velocity(1, yaw=0.2), Velocity(1, yaw=0.2)]
    expected += [
        Velocity(3, yaw=0.2, pitch=0.1)
    ] * 2  # block 4: the timed line is due, and the line behind it takes its turn
    assert [control.velocity for control in got] == expected
    assert warnings == []


def test_at_is_met_although_block_times_are_sums_of_floats(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"forward": 1, "at": 1}\n')
    controls = open_controls(str(path), CRUISE, LIMITS, pytest.fail)
    times = list(itertools.accumulate([0.1] * 10))  # the last is 0.9999999999999999
    assert [
        controls.at(block, seconds).velocity.forward for block, seconds in enumerate(times)
    ] == [22.0] * 9 + [1.0]


def test_values_beyond_the_limits_are_clamped_and_said_once(tmp_path: Path) -> None:
    got, warnings = drive(
        tmp_path / "c.jsonl", '{"yaw": -9}\n{"yaw": 9, "forward": 1e9}\n{"yaw": 0.01}\n', 3
    )
    assert [control.velocity.yaw for control in got] == [-LIMITS.yaw, LIMITS.yaw, 0.01]
    assert got[1].velocity.forward == LIMITS.forward
    assert len(warnings) == 2
    assert "line 1: yaw = -9" in warnings[0]
    assert "line 2: forward = 1e+09" in warnings[1]


MALFORMED = [
    ("{", "not valid JSON"),
    ('{"forward": 1} {"yaw": 0}', "not valid JSON"),
    ("[1, 2]", "not a JSON object"),
    ("null", "not a JSON object"),
    ('{"forward": NaN}', "NaN"),
    ('{"forward": -Infinity}', "Infinity"),
    ('{"forward": 1e999}', "finite"),
    ('{"forward": 1' + "0" * 400 + "}", "finite"),
    ('{"forward": ' + "1" * 5000 + "}", "too large a number"),
    ('{"forward": "fast"}', "forward must be a number"),
    ('{"forward": true}', "forward must be a number"),
    ('{"forward": null}', "forward must be a number"),
    ('{"forward": 1, "speed": 2}', "unknown key 'speed'"),
    ('{"prompt": 3}', "prompt must be text"),
    ('{"forward": 1, "at": -1}', "before the stream's start"),
    ('{"forward": 1, "at": "soon"}', "at must be a number"),
    ("[" * 60_000, "nested too deeply"),
    ('{"prompt": "' + "x" * (64 << 10) + '"}', "longer than 65536 bytes"),
    ('{"prompt": "' + "x" * (1 << 20) + '"}', "longer than 65536 bytes"),
]


@pytest.mark.parametrize(
    ("line", "reason"),
    MALFORMED,
    ids=[reason + str(index) for index, (_, reason) in enumerate(MALFORMED)],
)
def test_a_malformed_line_is_named_and_changes_nothing(
    tmp_path: Path, line: str, reason: str
) -> None:
    path = tmp_path / "c.jsonl"
    got, warnings = drive(
        path, '# head\n{"forward": 5, "prompt": "rain"}\n' + line + '\n{"strafe": 1}\n', 3
    )
    assert got == [
        Control(Velocity(5), "rain"),
        Control(Velocity(5), "rain"),
        Control(Velocity(5, 1), "rain"),
    ]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{path} line 3: ")
    assert reason in warnings[0]
    assert len(warnings[0]) < 300 + len(str(path))


def test_bytes_that_are_no_text_and_a_byte_order_mark(tmp_path: Path) -> None:
    got, warnings = drive(
        tmp_path / "c.jsonl",
        b'\xef\xbb\xbf{"forward": 5}\r\n\xff\xfe\x00\n\x00\n{"yaw": 0.1}\r\n',
        4,
    )
    assert [control.velocity for control in got] == [
        Velocity(5),
        Velocity(5),
        Velocity(5),
        Velocity(5, yaw=0.1),
    ]
    assert [("not UTF-8" in w, "not valid JSON" in w) for w in warnings] == [
        (True, False),
        (False, True),
    ]


def test_a_flood_of_malformed_lines_is_cut_short(tmp_path: Path) -> None:
    got, warnings = drive(tmp_path / "c.jsonl", "nonsense\n" * 500 + '{"forward": 2}\n', 501)
    assert len(warnings) == 21
    assert "further malformed lines are not reported" in warnings[-1]
    assert (got[499].velocity, got[500].velocity) == (CRUISE, Velocity(2))


@pytest.mark.parametrize("name", ["missing.jsonl", ".", "missing/c.jsonl"])
def test_a_file_that_cannot_be_read_is_refused_at_once(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="controls") as caught:
        open_controls(str(tmp_path / name), CRUISE, LIMITS, pytest.fail)
    assert "JSON object per line" in caught.value.hint


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = (
        os.listdir("/proc/self/fd")
        if os.path.isdir("/proc/self/fd")
        else pytest.skip("needs /proc")
    )
    drive(tmp_path / "c.jsonl", '{"forward": 1}\n' * 9, 2)  # closed early
    drive(tmp_path / "c.jsonl", '{"forward": 1}\n', 5)  # read to its end
    assert os.listdir("/proc/self/fd") == before


def test_a_named_pipe_steers_live(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    controls = open_controls(str(path), CRUISE, LIMITS, pytest.fail)  # does not wait for a writer
    assert controls.at(0, 0.0) == Control(CRUISE, None)
    with path.open("w") as writer:
        writer.write('{"forward": 3}\n')
        writer.flush()
        wait_for(controls, lambda control: control.velocity.forward == 3)
        writer.write('{"strafe": 1}\n')
    wait_for(controls, lambda control: control.velocity == Velocity(3, 1))
    controls.close()


# A stream as a process of its own, because stdin must be real. It prints one line per change that
# it sees, and a prompt stops it.
STREAM = """
import sys, time
from aapt_deploy.models.aapt.camera import CRUISE, LIMITS
from aapt_deploy.stream.controls import open_controls
controls = open_controls("-", CRUISE, LIMITS, lambda text: print("warning", text, flush=True))
seen, block, slowest = None, 0, 0.0
print("ready", flush=True)
while block < 4000:
    start = time.perf_counter()
    control = controls.at(block, block * 0.005)
    slowest = max(slowest, time.perf_counter() - start)
    if control != seen:
        print(control.velocity.forward, control.velocity.strafe, control.prompt, flush=True)
    seen, block = control, block + 1
    if control.prompt == "stop":
        break
    time.sleep(0.005)
controls.close()
print("slowest", slowest, flush=True)
"""


@pytest.fixture
def stream() -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", STREAM], stdin=pipe, stdout=pipe, stderr=pipe, text=True, bufsize=1
    ) as process:
        yield process
        process.kill()


def test_stdin_steers_live_and_a_bad_line_is_survived(stream: subprocess.Popen[str]) -> None:
    assert stream.stdin is not None
    assert stream.stdout is not None
    assert [stream.stdout.readline() for _ in range(2)] == [
        "ready\n",
        "22.0 0.0 None\n",
    ]  # while stdin is silent
    for line, answer in [
        ('{"forward": 1}\n', "1.0 0.0 None\n"),
        (
            '{"forward": oops}\n',
            "warning stdin line 2: not valid JSON: Expecting value at column 13; "
            "the last good value stays\n",
        ),
        ('{"strafe": 2, "prompt": "snow"}\n', "1.0 2.0 snow\n"),
    ]:
        stream.stdin.write(line)
        assert stream.stdout.readline() == answer
    out, err = stream.communicate(
        '{"prompt": "stop"}', timeout=30
    )  # the last line has no newline; then stdin ends
    assert out.splitlines()[0] == "1.0 2.0 stop"
    assert (err, stream.returncode) == ("", 0)


def test_a_closed_stdin_leaves_the_last_value(stream: subprocess.Popen[str]) -> None:
    assert stream.stdin is not None
    assert stream.stdout is not None
    assert stream.stderr is not None
    stream.stdin.write('{"forward": 4}\n{"prompt": "stop", "at": 0.5}\n')
    stream.stdin.close()
    out, err = stream.stdout.read(), stream.stderr.read()
    assert "4.0 0.0 None" in out
    assert "4.0 0.0 stop" in out
    assert (err, stream.wait(30)) == ("", 0)


def test_a_stream_ends_quietly_while_stdin_stays_open_and_silent(
    stream: subprocess.Popen[str],
) -> None:
    assert stream.stdin is not None
    assert stream.stdout is not None
    assert stream.stderr is not None
    stream.stdin.write('{"prompt": "stop"}\n')
    assert (
        stream.wait(30) == 0
    )  # stdin is still open: the reading thread must not keep the process, nor complain
    assert stream.stderr.read() == ""


def test_a_flood_on_stdin_stays_small_and_current() -> None:
    """An endless fast sender: memory stays bounded, no block waits, the newest state counts."""
    script = STREAM.replace("block < 4000", "block < 300") + (
        "import resource\n"
        "print('grown', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    script = "import resource\n" + script.replace(
        'print("ready"',
        'before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nprint("ready"',
    )
    line = """'{"forward": %d, "at": %f}' % (n % 30, n * 1e-5) if n % 3 else 'bad' * 9"""
    sender = f"import itertools\nfor n in itertools.count(): print({line})"
    with (
        subprocess.Popen(
            [sys.executable, "-c", sender], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as flood,
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=flood.stdout,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as reader,
    ):
        assert flood.stdout is not None
        flood.stdout.close()
        out, err = reader.communicate(timeout=60)
    lines = out.splitlines()
    assert err == ""
    assert sum(line.startswith("warning") for line in lines) == 21
    assert len([line for line in lines if line[0].isdigit()]) > 20  # it kept moving
    assert int(lines[-1].split()[1]) < 8 << 10  # KiB
    assert float(next(line for line in lines if line.startswith("slowest")).split()[1]) < 1.0


def test_stdin_that_was_closed_before_the_start() -> None:
    command = [
        "sh",
        "-c",
        'exec "$0" -c "$1" <&-',
        sys.executable,
        STREAM.replace("block < 4000", "block < 20"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[:2] == ["ready", "22.0 0.0 None"]


def piped(path: Path, *lines: dict[str, object]) -> Controls:
    """Controls from a named pipe whose lines have all arrived, and whose reader is done."""
    os.mkfifo(path)
    controls = open_controls(str(path), CRUISE, LIMITS, pytest.fail)
    (reader,) = (thread for thread in threading.enumerate() if thread.name == "controls")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    reader.join(10)
    assert not reader.is_alive()
    return controls


def test_of_live_lines_before_one_block_the_newest_value_of_a_key_counts(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [
        {"forward": 3, "yaw": 0.1, "prompt": "rain"}, {"forward": 5}, {"prompt": "snow"},
        {"pitch": 0.1},
    ]  # fmt: skip
    controls = piped(tmp_path / "pipe", *lines)
    assert controls.at(0, 0.0) == Control(Velocity(5, yaw=0.1, pitch=0.1), "snow")
    controls.close()


def test_live_lines_with_a_time_wait_and_those_behind_them_too(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [
        {"forward": 1},
        {"forward": 2, "at": 2 * BLOCK_S},
        {"yaw": 0.1},
        {"yaw": 0.2},
    ]
    controls = piped(tmp_path / "pipe", *lines)
    found = [controls.at(block, block * BLOCK_S).velocity for block in range(3)]
    assert found == [Velocity(1), Velocity(1), Velocity(2, yaw=0.2)]
    controls.close()


@pytest.mark.parametrize("live", [True, False])
def test_a_time_typed_to_six_digits_acts_in_its_own_block(tmp_path: Path, live: bool) -> None:
    """A third of the blocks begin a little before such a number: 1/6 s is less than 0.166667."""
    typed: list[dict[str, object]] = [
        {"forward": block + 1, "at": round(block * BLOCK_S, 6)} for block in range(30)
    ]
    if live:
        controls = piped(tmp_path / "pipe", *typed)
    else:
        (tmp_path / "file").write_text("\n".join(map(json.dumps, typed)))
        controls = open_controls(str(tmp_path / "file"), CRUISE, LIMITS, pytest.fail)
    found = [controls.at(block, block * BLOCK_S).velocity.forward for block in range(30)]
    assert found == [block + 1 for block in range(30)]
    controls.close()


def test_a_time_after_its_block_s_start_waits_for_the_next(tmp_path: Path) -> None:
    controls = piped(tmp_path / "pipe", {"forward": 9, "at": BLOCK_S + 1e-5})
    assert [controls.at(block, block * BLOCK_S).velocity.forward for block in range(3)] == [
        22,
        22,
        9,
    ]
    controls.close()
