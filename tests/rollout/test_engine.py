"""Engines through a tap, and engines with one state."""

from typing import Any

import numpy as np
import pytest

from aapt_deploy.errors import MachineError
from aapt_deploy.profiles import Profile
from aapt_deploy.rollout.engine import Layered, OneState, Tapped
from tests.support.fake_engines import FakeEngines

Seen = list[tuple[str, str, dict[str, Any]]]


class Forking(FakeEngines):
    backend, precision, overlapped = "forking", "int8", True

    def fork(self) -> "Forking":
        return Forking(self.profile, "", self.calls)

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        return {"generator": {"k_cache.00": np.arange(3)}}

    def restore(self, state: Any) -> None:
        self.calls.append(("", "restore", dict(state)))


def test_every_call_goes_through_the_tap_with_its_arguments(tiny: Profile) -> None:
    seen: Seen = []

    def tap(graph: str, method: str, call: Any, arguments: dict[str, Any]) -> Any:
        seen.append((graph, method, arguments))
        found = call(**arguments)
        return found if found is None else {"changed": found}

    engines = Forking(tiny)
    tapped = Tapped(engines, tap)
    assert (tapped.backend, tapped.precision, tapped.overlapped) == ("forking", "int8", True)
    tapped.generator.reset(text="x")  # type: ignore[arg-type]
    assert list(tapped.generator.run(block=3)) == ["changed"]
    tapped.generator.commit(3)
    tapped["decoder"].reset()
    assert list(tapped["decoder"].run(latent=1)["changed"]) == list(engines.run())  # type: ignore[call-overload]
    wanted: Seen = [
        ("generator", "reset", {"text": "x"}), ("generator", "run", {"block": 3}),
        ("generator", "commit", {"block": 3}), ("decoder", "reset", {}),
        ("decoder", "run", {"latent": 1}),
    ]  # fmt: skip
    assert seen == wanted
    assert [call[:2] for call in engines.calls[:5]] == [call[:2] for call in wanted]


def test_a_tapped_fork_is_tapped_and_state_is_the_engines_own(tiny: Profile) -> None:
    seen: list[str] = []
    engines = Forking(tiny)
    tapped = Tapped(engines, lambda graph, method, call, given: seen.append(graph))
    fork = tapped.fork()
    assert isinstance(fork, Tapped) and fork.engines is not engines and fork.tap is tapped.tap
    fork["encoder"].run()
    assert seen == ["encoder"]
    state = tapped.state()
    assert state["generator"]["k_cache.00"].tolist() == [0, 1, 2]
    tapped.restore(state)
    tapped.close()
    assert engines.calls == [("", "restore", state), ("", "close", {})]


def test_engines_with_one_state_say_what_they_cannot_and_what_can() -> None:
    class One(OneState):
        backend = "torch-cuda"

    for call, what in (
        (One().fork, "a second stream over the same weights"), (One().state, "reading its state"),
        (lambda: One().restore({}), "setting its state"),
    ):  # fmt: skip
        with pytest.raises(MachineError) as caught:
            call()
        assert str(caught.value) == f"backend torch-cuda does not support {what}"
        assert "--backend onnxruntime" in caught.value.hint


def test_engines_that_time_their_layers_are_told_apart(tiny: Profile) -> None:
    class Timing(FakeEngines):
        def layer_times(self, runs: int) -> dict[str, Any]:
            return {}

    assert isinstance(Timing(tiny), Layered) and not isinstance(FakeEngines(tiny), Layered)
