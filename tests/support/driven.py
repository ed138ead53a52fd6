"""A generator of the GPU engine that is given numbers of a test's own."""

import numpy as np
import torch

from aapt_deploy.backends.torch_cuda import engine as torch_cuda
from aapt_deploy.backends.torch_cuda.calibrate import noise_inputs
from aapt_deploy.profiles import Profile

CPU = torch.device("cpu")


class Driven:
    """The generator of `engines`, given numbers of its own: what a pass says, block after block."""

    def __init__(self, engines: torch_cuda.GpuEngines, profile: Profile) -> None:
        self.generator, self.profile = engines["generator"], profile
        self.generator.reset()
        self.generator.reset(**engines["prompt"].run(text=np.array([[4, 1, 2, 3]])))

    def said(self, block: int, seed: int) -> np.ndarray:
        made = noise_inputs(self.profile, seed, CPU).items()
        inputs = {name: x.numpy() for name, x in made if name not in ("slot", "cache_len")}
        return self.generator.run(**inputs, block=block)["clean"].copy()
