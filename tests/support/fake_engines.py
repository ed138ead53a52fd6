"""Engines that note every call and answer with constants."""

import numpy as np

from aapt_deploy.profiles import Profile

CLEAN = 0.25  # what the fake generator sees in any noise


class FakeEngines:
    """All four engines: notes every call, answers with constants."""

    backend, precision, overlapped = "fake", "fp32", False

    def __init__(
        self,
        profile: Profile,
        graph: str = "",
        calls: list[tuple[str, str, dict[str, object]]] | None = None,
    ) -> None:
        self.profile, self.graph, self.calls = profile, graph, [] if calls is None else calls

    @property
    def generator(self) -> "FakeEngines":
        return self["generator"]

    def __getitem__(self, graph: str) -> "FakeEngines":
        return type(self)(self.profile, graph, self.calls)

    def reset(self, **state: np.ndarray) -> None:
        self.calls.append((self.graph, "reset", dict(state)))

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        self.calls.append((self.graph, "run", {k: np.copy(v) for k, v in inputs.items()}))
        v = self.profile.video
        latent = np.full(
            (1, v.latent_channels, self.profile.latent_height, self.profile.latent_width),
            CLEAN,
            np.float32,
        )
        frames = (
            np.arange(4, dtype=np.uint8)
            .repeat(v.height * v.width * 3)
            .reshape(4, v.height, v.width, 3)
        )
        return {"latent": latent, "clean": latent, "frames": frames, "text_k.00": np.zeros(1)}

    def commit(self, block: int) -> None:
        self.calls.append((self.graph, "commit", {"block": block}))

    def close(self) -> None:
        self.calls.append(("", "close", {}))
