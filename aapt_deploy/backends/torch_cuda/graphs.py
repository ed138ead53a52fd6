"""The graphs of a bundle as engines on the GPU, each on a lane."""

import numpy as np
import torch
from torch import Tensor

from aapt_deploy.backends.torch_cuda.decoder import StreamDecoder
from aapt_deploy.backends.torch_cuda.lane import Lane, Packed
from aapt_deploy.backends.torch_cuda.step import NOWHERE, Step
from aapt_deploy.bundle.signature import TensorSpec, layer_names
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.graphs import EncoderGraph
from aapt_deploy.models.aapt.signature import signatures
from aapt_deploy.models.aapt.vae import Vae
from aapt_deploy.ops.block_causal_attention import Ring
from aapt_deploy.profiles import Profile


class GpuGenerator:
    """The generator and its caches."""

    def __init__(self, step: Step, profile: Profile, lane: Lane) -> None:
        self.profile, self.ring, self.lane, self.cache = profile, Ring.of(profile), lane, step.cache
        slot = TensorSpec("slot", (1,), "int32")
        self.inputs = Packed([*signatures(profile)["generator"].inputs, slot], lane.device)
        self.clean = torch.zeros(self.inputs.tensors["noisy"].shape, device=lane.device)
        self.shown = torch.zeros(self.clean.shape, pin_memory=lane.stream is not None)
        self.names = [layer_names(f"text_{kind}", profile) for kind in ("k", "v")]
        lane.settle()  # the zeros above are queued elsewhere: they could overwrite an upload
        self.reset()
        with lane.mine():
            self.inputs.upload({"time": 1.0, "slot": NOWHERE})
        self.step = lane.prepare(lambda: self.clean.copy_(step(self.inputs.tensors)))
        self.reset()

    def reset(self, **state: np.ndarray) -> None:
        """Clear the caches, or write the text in `state` to the front of them.

        It is float32, or bf16 as uint16, as `GpuPrompt` returns it.
        """
        with self.lane.mine():
            if not state:
                self.cache.clear()
                self.pending = NOWHERE
            for layer, (k, v) in enumerate(zip(*self.names, strict=True)):
                if k in state:
                    self.cache.write_text(layer, *(self._text(state[name]) for name in (k, v)))
            self.lane.wait()

    def _text(self, values: np.ndarray) -> Tensor:
        bits = values.dtype == np.uint16
        kind = torch.bfloat16 if self.lane.stream or bits else torch.float32
        tensor = torch.from_numpy(values.view(np.int16) if bits else values)
        tensor = tensor.view(torch.bfloat16) if bits else tensor
        return tensor.to(self.lane.device, kind)

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        place = self.ring.place(int(inputs.pop("block")))
        with self.lane.mine():
            self.inputs.upload({**inputs, "cache_len": place.cache_len, "slot": self.pending})
            self.pending = NOWHERE
            self.step()
            self.shown.copy_(self.clean, non_blocking=True)
            self.lane.wait()
        return {"clean": self.shown.numpy()}

    def commit(self, block: int) -> None:
        self.pending = self.ring.place(block).slot  # the next pass begins with it


class GpuPrompt:
    """The prompt: text to every layer's keys and values, bf16 as uint16."""

    def __init__(self, generator: Generator, dtype: torch.dtype, lane: Lane) -> None:
        self.generator, self.dtype, self.lane = generator, dtype, lane
        self.names = [layer_names(f"text_{kind}", generator.profile) for kind in ("k", "v")]

    def reset(self, **state: np.ndarray) -> None:
        pass

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        text = torch.from_numpy(np.asarray(inputs["text"])).to(self.lane.device)
        with self.lane.mine():
            self.lane.settle()
            given = text.to(self.dtype) if text.is_floating_point() else text
            kept = [torch.stack(group).cpu() for group in self.generator.prompt(given)]
        made: dict[str, np.ndarray] = {}
        for names, x in zip(self.names, kept, strict=True):
            bits = x.dtype == torch.bfloat16
            group = x.view(torch.int16).numpy().view(np.uint16) if bits else x.numpy()
            made |= zip(names, group, strict=True)
        return made


class GpuEncoder:
    """The encoder: the first image to latent 0, in float32, because it is run once."""

    def __init__(self, vae: Vae, lane: Lane) -> None:
        self.graph, self.lane = EncoderGraph(vae), lane

    def reset(self, **state: np.ndarray) -> None:
        pass

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        image = torch.from_numpy(np.asarray(inputs["image"])).to(self.lane.device)
        with self.lane.mine():
            self.lane.settle()
            return {"latent": self.graph(image).cpu().numpy()}


class GpuDecoder:
    """The decoder: a latent frame to four frames in pinned memory."""

    def __init__(self, decoder: StreamDecoder, profile: Profile, lane: Lane) -> None:
        signature = signatures(profile)["decoder"]
        self.lane, self.decoder, frames = lane, decoder, signature.outputs[0].shape
        self.inputs = Packed(list(signature.inputs), lane.device)
        self.frames = torch.zeros(frames, dtype=torch.uint8, device=lane.device)
        self.shown = torch.zeros(frames, dtype=torch.uint8, pin_memory=lane.stream is not None)
        if lane.stream:
            with lane.mine():
                decoder.choose(lane.seconds)
        self.step = lane.prepare(lambda: self.frames.copy_(decoder(self.inputs.tensors["latent"])))
        self.reset()

    def reset(self, **state: np.ndarray) -> None:
        with self.lane.mine():
            self.decoder.clear()
            self.lane.wait()

    def run(self, **inputs: np.ndarray | int) -> dict[str, np.ndarray]:
        with self.lane.mine():
            self.inputs.upload(inputs)
            self.step()
            self.shown.copy_(self.frames, non_blocking=True)
            self.lane.wait()
        return {"frames": self.shown.numpy()}


GpuEngine = GpuGenerator | GpuPrompt | GpuEncoder | GpuDecoder
