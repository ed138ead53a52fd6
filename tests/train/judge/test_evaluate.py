"""Test each figure against a known case, then the whole command on the tiny bundle."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aapt_deploy.bundle.bundle import Bundle
from aapt_deploy.errors import OutputError, UsageError
from aapt_deploy.models.aapt.camera import Pose, Velocity
from aapt_deploy.models.aapt.prompts import Look
from aapt_deploy.models.checkpoint import Checkpoint
from aapt_deploy.profiles import Profile, load
from aapt_deploy.train.judge import evaluate, figures, scores
from aapt_deploy.train.judge.figures import (
    Classifier,
    Crowd,
    Response,
    Track,
    frechet,
    measure_frames,
    stacked,
)
from aapt_deploy.train.judge.flights import FlightPlan, flight_plans, generated_flight
from aapt_deploy.train.world.worlds import CLEARANCE, World, headroom
from tests.support.commands import Ran
from tests.support.opening import open_engines

DEMO = load("demo-cpu")


@pytest.fixture(scope="module")
def planned() -> list[FlightPlan]:
    """Eight true flights of one second at demo size."""
    return list(flight_plans(DEMO, 8, 6))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "TEACHING_WORLDS", 6)


# --- motion ---


def landscape(
    scale: float, right: float, down: float, size: tuple[int, int] = (112, 192)
) -> torch.Tensor:
    """A smooth random picture [1, H, W], magnified by `scale` about its centre and then moved."""
    h, w = size
    rng = np.random.default_rng(0)
    y, x = np.meshgrid(np.arange(h) - (h - 1) / 2, np.arange(w) - (w - 1) / 2, indexing="ij")
    u, v = (x - right) / scale, (y - down) / scale
    waves = sum(
        a * np.sin(i * u + j * v + c)
        for a, i, j, c in rng.uniform([5, -0.25, -0.25, 0], [20, 0.25, 0.25, 6], (24, 4))
    )
    return torch.from_numpy(128 + np.asarray(waves)[None]).float()


@pytest.mark.parametrize(
    "moved", [(0, 0, 0), (3.0, 0, 0), (-1.25, 2.5, 0), (0, 0, 0.03), (1.0, -1.0, -0.02)]
)
def test_motion_is_found_to_hundredths_of_a_pixel(moved: tuple[float, float, float]) -> None:
    right, down, zoom = moved
    found = figures.motion(landscape(1, 0, 0), landscape(1 + zoom, right, down))[0].numpy()
    np.testing.assert_allclose(found[:2], (right, down), atol=0.02)
    np.testing.assert_allclose(found[2], zoom, atol=5e-4)


def test_a_picture_without_texture_does_not_move() -> None:
    assert (
        figures.motion(torch.full((2, 32, 64), 90.0), torch.full((2, 32, 64), 91.0)).abs().max()
        == 0
    )


def test_a_turn_moves_the_true_picture_against_it() -> None:
    """One rad is a focal length of pixels in the middle: 125 at 192 pixels and 75 degrees.

    At the edges it is 1.6 times that.
    """
    world, pose = World(3, Look(weather="clear")), Pose(z=90.0)
    turned = [world.render(pose), world.render(pose.moved(Velocity(yaw=0.25), 1 / 24))]
    right, down, zoom = measure_frames(turned[1][None], before=turned[0]).motion[0]
    assert 1.0 < right / (-0.25 / 24 * 125) < 1.25 and abs(down) < 0.1 and abs(zoom) < 2e-3


def test_what_moves_is_measured_from_block_to_block() -> None:
    """Three blocks of a picture that moves by 2 pixels a block."""
    shown = [landscape(1, right, 0)[0].clamp(0, 255).byte().numpy() for right in (0, 2, 4, 6)]
    colour = np.repeat(np.stack(shown)[..., None], 3, axis=-1)  # [4, H, W, 3]
    np.testing.assert_allclose(measure_frames(colour).motion[:, 0], [0, 2, 2, 2], atol=0.05)
    track = measure_frames(colour[1:], before=colour[0])
    np.testing.assert_allclose(track.motion[:, 0], [2, 2, 2], atol=0.05)
    np.testing.assert_allclose(track.flow, [2, 2, 2], atol=0.05)
    np.testing.assert_allclose(
        track.change, np.abs(np.diff(colour[..., 0].astype(float), axis=0)).mean((1, 2)), rtol=1e-5
    )


def test_the_flow_of_a_zoom_is_the_root_mean_square_over_the_picture() -> None:
    near = [landscape(scale, 0, 0)[0].clamp(0, 255).byte().numpy() for scale in (1, 1.03)]
    flow = measure_frames(np.repeat(np.stack(near)[..., None], 3, axis=-1)).flow[1:]
    y, x = np.meshgrid(np.arange(112) - 55.5, np.arange(192) - 95.5, indexing="ij")
    assert flow[0] == pytest.approx(0.03 * np.sqrt((x**2 + y**2).mean()), rel=0.03)


# --- crowds, prompts, cameras ---


def test_frechet_of_gaussians_in_closed_form() -> None:
    rng = np.random.default_rng(0)
    z = rng.standard_normal((200_000, 3))
    a, b = z * [1, 2, 3], z[::-1] * [2, 2, 1] + [1, 0, -2]
    expected = (1 + 4) + (1 - 2) ** 2 + 0 + (3 - 1) ** 2
    assert frechet(a, b) == pytest.approx(expected, rel=0.02)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-9)
    assert abs(frechet(a, a)) < 1e-9


def test_the_distance_grows_with_a_blur_and_is_zero_for_the_crowd_itself(
    planned: list[FlightPlan],
) -> None:
    pictures = np.concatenate([plan.true for plan in planned])
    crowd = Crowd(measure_frames(pictures).features)
    soft = [
        torch.nn.functional.avg_pool2d(
            torch.from_numpy(pictures).float().permute(0, 3, 1, 2), n, 1, n // 2
        )
        for n in (3, 7)
    ]
    blurred = [s[..., :112, :192].permute(0, 2, 3, 1).byte().numpy() for s in soft]
    none, little, much = (crowd.distance(measure_frames(p).features) for p in (pictures, *blurred))
    assert none < 1e-6 and 10 * 1e-6 < little < much


def test_features_and_measures_are_deterministic_and_do_not_depend_on_the_batch(
    planned: list[FlightPlan],
) -> None:
    shown = planned[0].true
    once, twice = (
        measure_frames(shown),
        stacked([measure_frames(shown[:2]), measure_frames(shown[2:], before=shown[1])]),
    )
    for name, a, b in zip(Track._fields, once, twice, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=name)
        assert len(a) == len(shown) and a.dtype == np.float64


def test_measures_of_a_picture_by_hand() -> None:
    stripes = np.zeros((2, 32, 64, 3), np.uint8)
    stripes[:, ::2] = 100
    stripes[1] += 7
    track = measure_frames(stripes)
    assert track.gradient[1] == pytest.approx(100, rel=1e-5) and track.change == pytest.approx(
        [0, 7], rel=1e-5
    )
    np.testing.assert_allclose(track.colour[1], 57)


def test_a_response_is_recovered_from_commands_and_motion() -> None:
    rng = np.random.default_rng(1)
    commands, gains = rng.standard_normal((500, 4)), rng.standard_normal((4, 3))
    true = Response.fit(commands, commands @ gains + [1, 2, 3])
    np.testing.assert_allclose(true.gains, gains, atol=1e-9)
    lazy = commands * [0.5, 1, 0, 1]
    obeyed = Response.fit(commands, lazy @ gains).against(true)
    assert obeyed == pytest.approx({"yaw": 0.5, "strafe": 1, "pitch": 0, "forward": 1})
    assert true.correlation(commands, commands @ gains) == pytest.approx(
        {"right": 1, "down": 1, "zoom": 1}
    )
    assert abs(true.correlation(commands, rng.standard_normal((500, 3)))["right"]) < 0.15


def test_the_error_of_a_gain_is_that_of_flights_drawn_anew() -> None:
    """Gains of deviation 0.3 have a mean that is known to 0.3 / sqrt(flights)."""
    rng = np.random.default_rng(2)
    true = Response(np.ones((4, 3)))

    def deviation(count: int) -> float:
        flights = []
        for _ in range(count):
            commands = rng.standard_normal((200, 4))
            flights.append((commands, commands @ np.full((4, 3), 1 + 0.3 * rng.standard_normal())))
        return float(
            np.std([response.against(true)["forward"] for response in Response.resampled(flights)])
        )

    assert deviation(400) == pytest.approx(0.3 / 20, rel=0.3) and deviation(25) == pytest.approx(
        0.3 / 5, rel=0.5
    )
    same = rng.standard_normal((30, 4))
    fits = Response.resampled([(same, same @ np.eye(4)[:, :3])] * 3)
    np.testing.assert_allclose(
        np.stack([fit.gains for fit in fits]),
        np.eye(4)[None, :, :3].repeat(len(fits), 0),
        atol=1e-9,
    )


def test_a_command_that_is_never_given_has_no_gain() -> None:
    rng = np.random.default_rng(3)
    commands = rng.standard_normal((60, 4)) * [1, 0, 1, 0]
    commands[:, 3] = 2.0  # always forward: that cannot be told from the offset
    answered = Response.fit(commands, commands @ rng.standard_normal((4, 3)))
    found = answered.against(Response(np.ones((4, 3))))
    assert (
        np.isfinite([found["yaw"], found["pitch"]]).all()
        and np.isnan([found["strafe"], found["forward"]]).all()
    )
    assert scores._rounded(found)["strafe"] is None
    assert np.isnan(answered.correlation(np.ones((5, 4)), rng.standard_normal((5, 3)))["right"])


def test_a_crowd_has_no_more_components_than_a_third_of_its_flights() -> None:
    features = np.random.default_rng(4).standard_normal((200, 30))
    assert [Crowd(features, flights).true.shape[1] for flights in (2, 12, 30, 300)] == [
        1,
        4,
        10,
        10,
    ]


def test_the_classifier_reads_the_time_of_day_and_fails_on_noise() -> None:
    worlds = [World(seed, Look(time=time)) for seed in range(14) for time in ("noon", "night")]
    pictures = np.stack(
        [world.render(Pose(x=40.0 * i, z=world.altitude + 30)) for i, world in enumerate(worlds)]
    )
    seen, looks = measure_frames(pictures).features, [world.look for world in worlds]
    classifier = Classifier(seen[:20], looks[:20])
    assert classifier.obedience(seen[20:], looks[20:])["time"] > 0.9
    other = [Look(look.place, look.season, "dawn", look.weather) for look in looks]
    assert classifier.obedience(seen, other)["time"] < 0.1


# --- flights ---


def test_plans_repeat_and_stay_above_the_ground(planned: list[FlightPlan]) -> None:
    again = list(flight_plans(DEMO, 2, 6))
    for a, b in zip(planned, again, strict=False):
        assert (a.seed, a.start, a.velocities) == (b.seed, b.start, b.velocities)
        np.testing.assert_array_equal(a.true, b.true)
    assert len({plan.seed for plan in planned}) == 8
    for plan in planned:
        poses = [plan.start]
        for velocity in plan.velocities:
            poses.append(poses[-1].moved(velocity, 1 / 6))
        world = World(plan.seed, Look())
        assert headroom(world, poses) > CLEARANCE
        np.testing.assert_array_equal(plan.true[-1], world.render(poses[-1]))


def test_a_long_plan_stays_above_the_ground_to_its_end_and_shows_it() -> None:
    (plan,) = flight_plans(DEMO, 1, 100)
    (short,) = flight_plans(DEMO, 1, 30)
    assert (plan.start, plan.velocities[:30]) == (short.start, short.velocities) and len(
        plan.velocities
    ) == 100
    np.testing.assert_array_equal(plan.true, short.true)
    world, poses = World(plan.seed, Look()), [plan.start]
    for velocity in plan.velocities:
        poses.append(poses[-1].moved(velocity, 1 / 6))
    for first in range(0, 100, 30):  # no stretch touches the ground
        assert headroom(world, poses[first : first + 31]) > CLEARANCE
    assert len(plan.true) == 31 and len(plan.late) == 31 and len(short.late) == 0
    np.testing.assert_array_equal(plan.late[-1], world.render(poses[-1]))
    np.testing.assert_array_equal(plan.late[0], world.render(poses[70]))


def test_true_and_generated_cameras_are_one(planned: list[FlightPlan]) -> None:
    """Commands count from a level camera, where a stream begins.

    The true flight meets the stops of pitch at the same moments.
    """
    for plan in planned:
        poses = [plan.start]
        for velocity in plan.velocities:
            poses.append(poses[-1].moved(velocity, 1 / 6))
        np.testing.assert_allclose(
            plan.commands(DEMO)[:, 2], np.diff([pose.pitch for pose in poses]), atol=1e-12
        )
    assert len({plan.start.z for plan in planned}) > 1


def test_a_flight_begins_anew_where_it_ended() -> None:
    plan = FlightPlan(
        0,
        Look(),
        Pose(),
        tuple(Velocity(forward=float(i)) for i in range(60)),
        np.zeros((7, 4, 8, 3), np.uint8),
        np.zeros(0),
    )
    last = np.full((4, 8, 3), 9, np.uint8)
    anew = scores.restarted(plan, last, 30)
    assert (
        [v.forward for v in anew.velocities] == list(range(30, 60))
        and anew.true.shape == (1, 4, 8, 3)
        and (anew.true == 9).all()
    )


@pytest.mark.parametrize(
    "paths",
    [
        ("runs/a-0.1", "runs/a-0.2"),
        ("a/x.safetensors", "b/x.safetensors"),
        ("a/x", "a/x.safetensors/y"),
    ],
)
def test_names_tell_candidates_apart(paths: tuple[str, str]) -> None:
    assert len(set(evaluate._names([Path(path) for path in paths]))) == 2


def test_a_pitch_at_its_stop_is_no_command() -> None:
    plan = FlightPlan(0, Look(), Pose(), (Velocity(pitch=0.16),) * 12, np.zeros(0), np.zeros(0))
    pitch = plan.commands(DEMO)[:, 2]
    assert pitch[0] == pytest.approx(0.16 / 6) and pitch[-1] == 0
    assert pitch.sum() == pytest.approx(0.22)


def test_a_flight_is_the_rollout_under_the_plan(bundle: Path, tiny: Profile) -> None:
    plan = next(flight_plans(tiny, 1, 4))
    opened = Bundle.open(bundle)
    engines = open_engines(opened, "onnxruntime", "fp32")
    flown = list(generated_flight(engines, tiny, plan))
    engines.close()
    assert [frame.shape for frame in flown] == [(tiny.video.height, tiny.video.width, 3)] * 5
    assert any((a != b).any() for a, b in pairwise(flown))


# --- the whole ---


def test_a_perfect_generator_scores_one(planned: list[FlightPlan]) -> None:
    """The true flights, judged as if they had been generated."""
    tracks = [measure_frames(plan.true) for plan in planned]
    seen = stacked([track.rows(slice(1, None)) for track in tracks])
    commands = [plan.commands(DEMO) for plan in planned]
    truth = scores.Truth(
        planned, tracks, [], Crowd(seen.features),
        Response.fit(np.concatenate(commands), seen.motion),
        Classifier(seen.features, [plan.look for plan in planned for _ in range(6)]), commands,
    )  # fmt: skip
    judged = scores.score([scores.Flown(track, np.zeros(0)) for track in tracks], truth, DEMO)
    (window,) = judged["windows"]
    assert (
        window["sharpness"] == window["dynamics"] == window["flow"] == 1
        and abs(window["distance"]) < 1e-3
    )
    assert window["gains"] == {"yaw": 1, "strafe": 1, "pitch": 1, "forward": 1}
    assert [m["terrain"] for m in judged["seconds"]] == [1, 1] and judged["seconds"][1][
        "recognised"
    ] == 1
    swapped = scores.score(
        [scores.Flown(track, np.zeros(0)) for track in tracks[1:] + tracks[:1]], truth, DEMO
    )
    assert swapped["seconds"][1]["recognised"] == 0 and swapped["seconds"][1]["terrain"] < 0.9


def finite(value: Any) -> bool:
    """No NaN; none of three flights may have been told to pitch, and then there is no figure."""
    return (
        all(map(finite, value.values() if isinstance(value, dict) else value))
        if isinstance(value, dict | list)
        else np.isfinite(value or 0)
    )


@pytest.mark.usefixtures("quick")
def test_evaluate_writes_a_record_curves_and_frames(
    aapt: Any, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "evaluation"
    ran: Ran = aapt(
        "train", "evaluate", bundle, "--out", out, "--flights", 3, "--seconds", 10, "--json"
    )
    assert ran.code == 0, ran.err
    record = json.loads(ran.out)
    assert record == json.loads((out / "evaluation.json").read_text())
    (made,) = record["made"].values()
    assert [w["from_s"] for w in made["windows"]] == [0, 5] and len(made["seconds"]) == 6
    assert (
        finite(made["windows"])
        and finite(made["seconds"])
        and finite(made["drift_per_minute"])
        and finite(record["true"])
    )
    assert 0 < made["windows"][0]["sharpness"] != 1
    assert record["true"]["last"]["from_s"] == 5 and record["true"]["last"]["sharpness"] != 1
    assert made["engine"] == "onnxruntime-fp32" and set(made["again"]) == set(
        made["windows"][0]
    ) - {"from_s"}
    assert sorted(path.name for path in out.iterdir()) == [
        "curves.png",
        "evaluation.json",
        "sheet-bundle.png",
    ]
    assert (
        "after 5 s: terrain" in ran.err
        and "true" in ran.err
        and "anew" in ran.err
        and "standard errors" in ran.err
    )


@pytest.mark.usefixtures("quick")
def test_checkpoints_and_bundles_are_judged_side_by_side(
    aapt: Any, bundle: Path, loaded: Checkpoint, tmp_path: Path
) -> None:
    out, other = tmp_path / "evaluation", tmp_path / "other" / loaded.path.name
    other.parent.mkdir()
    other.write_bytes(loaded.path.read_bytes())
    ran: Ran = aapt(
        "train",
        "evaluate",
        bundle,
        loaded.path,
        other,
        "--precision",
        "fp32",
        "--out",
        out,
        "--flights",
        2,
        "--seconds",
        5,
        "--json",
    )
    assert ran.code == 0, ran.err
    made = json.loads(ran.out)["made"]
    assert list(made) == [
        f"{bundle.parent.name}-bundle",
        f"{loaded.path.parent.name}-tiny",
        "other-tiny",
    ]
    by_engine, by_torch, again = made.values()
    assert by_torch == again and by_engine["checkpoint"] == loaded.sha256 == again["checkpoint"]
    assert by_torch["windows"][0]["sharpness"] == pytest.approx(
        by_engine["windows"][0]["sharpness"], abs=0.02
    )


def test_what_cannot_be_judged_is_refused_before_the_first_flight(
    aapt: Any, bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for more, code in [
        (("--backend", "nope"), UsageError.exit_code),
        (("--out", tmp_path / "file" / "e"), OutputError.exit_code),
    ]:
        ran: Ran = aapt(
            "train",
            "evaluate",
            bundle,
            "--out",
            tmp_path / "e",
            "--flights",
            1,
            "--seconds",
            5,
            *more,
        )
        assert (
            ran.code == code and "true flights" not in ran.err and not (tmp_path / "e").exists()
        ), ran.err
    for more in (("--seconds", 7), ("--recipe", "nope")):
        ran = aapt("train", "all", tmp_path / "all", "--worlds", 1, "--profile", "tiny-cpu", *more)
        assert ran.code == UsageError.exit_code and not (tmp_path / "all").exists(), ran.err


def test_a_checkpoint_named_twice_is_refused(aapt: Any, loaded: Checkpoint, tmp_path: Path) -> None:
    ran: Ran = aapt(
        "train", "evaluate", loaded.path, loaded.path, "--out", tmp_path / "e", "--seconds", 5
    )
    assert (
        ran.code == UsageError.exit_code
        and "named twice" in ran.error
        and not (tmp_path / "e").exists()
    )


def test_an_odd_length_is_refused_at_once(aapt: Any, bundle: Path, tmp_path: Path) -> None:
    ran: Ran = aapt("train", "evaluate", bundle, "--out", tmp_path / "e", "--seconds", 7)
    assert (
        ran.code == UsageError.exit_code
        and "7 seconds" in ran.error
        and not (tmp_path / "e").exists()
    )
