"""What a GPU's kernels are held against, in torch and on the kernels' own device.

Checks their bytes, their arithmetic, and float64 attention.

Shared by tests/ops/block_causal_attention/test_kernels_on_gpu.py and bench/attention.py. Nothing
here knows a GPU: tests/ops/block_causal_attention/test_attention_checks.py runs all of it on a CPU,
with the kernels' source run thread by thread. So the first minutes on a GPU are spent on the
kernels and not on their checks.

The layout comes from hopper_fp8.py's tables, the order of visits and the roundings from
emulator.py, both written anew for tensors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from aapt_deploy.ops.block_causal_attention import Ring, kernels, softmax_scale
from aapt_deploy.ops.block_causal_attention.hopper_fp8 import E4M3_MAX, TILE_KEYS, geometry, tiles

Run = Callable[
    [str, Sequence[Tensor], Sequence[int], Sequence[Tensor]], None
]  # kernel, inputs, numbers, outputs
ROWS = 256  # query rows at most that are computed in float64


def on_gpu(dim: int, variant: str | None = None) -> Run:
    """Launches on torch's current stream, of one of kernels.VARIANTS or of the chosen one."""
    loaded = kernels.load(dim, kernels.VARIANTS[variant or kernels.CHOSEN])

    def run(
        kernel: str, inputs: Sequence[Tensor], numbers: Sequence[int], outputs: Sequence[Tensor]
    ) -> None:
        assert all(x.is_contiguous() for x in (*inputs, *outputs))
        loaded(
            kernel,
            [x.data_ptr() for x in inputs],
            numbers,
            [x.data_ptr() for x in outputs],
            torch.cuda.current_stream().cuda_stream,
        )

    return run


@dataclass(frozen=True)
class Scales:
    q: Tensor  # [H]
    k: Tensor  # [H]
    k_mean: Tensor  # [H, D]
    v: Tensor  # [H, D]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> "Scales":
        """For samples [n, H, D]: the largest magnitude becomes 448, K centred first."""
        k_mean = k.double().mean(0).float()
        largest = (
            q.float().abs().amax((0, 2)),
            (k.float() - k_mean).abs().amax((0, 2)),
            v.float().abs().amax(0),
        )
        q_scale, k_scale, v_scale = (x.clamp(min=1e-6) / E4M3_MAX for x in largest)
        return cls(q_scale, k_scale, k_mean, v_scale)

    def codes(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[n, H, D] each -> e4m3."""
        return (
            e4m3(q.float() / self.q[:, None]),
            e4m3((k.float() - self.k_mean) / self.k[:, None]),
            e4m3(v.float() / self.v),
        )


def e4m3(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def image(
    codes: Tensor, offsets: np.ndarray, capacity: int | None = None, fill: Tensor | None = None
) -> Tensor:
    """e4m3 [n, H, D] -> uint8 [H, tiles, 64 * D]; unused bytes are zero, or those of `fill`."""
    n, heads, dim = codes.shape
    shape = (heads, tiles(n if capacity is None else capacity), TILE_KEYS * dim)
    out = (
        torch.zeros(shape, dtype=torch.uint8, device=codes.device) if fill is None else fill.clone()
    )
    token = torch.arange(n, device=codes.device)
    index = (token // TILE_KEYS * TILE_KEYS * dim)[:, None] + torch.from_numpy(offsets).to(
        codes.device
    )[token % TILE_KEYS]  # [n, D]
    out.view(heads, -1)[:, index] = codes.view(torch.uint8).transpose(0, 1)
    return out


def draw(
    kind: str, tokens: int, cached: int, heads: int, dim: int, seed: int, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 q [T, H, D], k and v [S + T, H, D] in the order of the cache, the block last.

    The recipes are those of attention_data.py.
    """
    generator = torch.Generator(device).manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, heads, dim, generator=generator, device=device)
    topics = lambda n: torch.randint(32, (n,), generator=generator, device=device)
    directions, means = normal(32), normal(32) + normal(1)
    k = unit_rms(directions[topics(cached + tokens)] + 1.5 * normal(cached + tokens))
    v = means[topics(cached + tokens)] + normal(cached + tokens)
    q = unit_rms(directions[topics(tokens)] + 1.5 * normal(tokens)) * (2 if kind == "sharp" else 1)
    if kind == "outlier":
        k[:, :, :4] += 6
    if kind == "sink":
        common = unit_rms(normal(1))
        q += 0.5 * common
        k[:16] += 9 * dim**0.5 / (0.5 * dim) * common
        v[:16] *= 0.3
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def unit_rms(x: Tensor) -> Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt()


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """float64 attention of q [R, H, D] over k, v [n, H, D]."""
    scores = (
        q.double().transpose(0, 1) @ k.double().permute(1, 2, 0) * softmax_scale(q.shape[-1])
    )  # [H, R, n]
    return (scores.softmax(-1) @ v.double().transpose(0, 1)).transpose(0, 1)


def rmse(out: Tensor, true: Tensor) -> float:
    """Relative; NaN anywhere gives NaN, which fails every comparison."""
    return float(
        (out.double() - true.double()).square().sum().sqrt() / true.double().square().sum().sqrt()
    )


class Case:
    """One launch with everything around it.

    Bytes of the cache behind `cached` hold finite rubbish.
    """

    def __init__(
        self,
        kind: str,
        tokens: int,
        cached: int,
        heads: int,
        dim: int,
        seed: int,
        device: str,
        spare: int = 70,
    ) -> None:
        self.tokens, self.cached, self.heads, self.dim, self.device = (
            tokens,
            cached,
            heads,
            dim,
            device,
        )
        self.q, self.k, self.v = draw(kind, tokens, cached, heads, dim, seed, device)
        self.scales = Scales.of(self.q, self.k, self.v)
        self.codes = self.scales.codes(self.q, self.k, self.v)
        self.offsets = (geometry(dim).k_offsets, geometry(dim).v_offsets)
        rubbish = torch.randint(
            0x7F, (heads, tiles(cached + spare), TILE_KEYS * dim), dtype=torch.uint8, device=device
        )  # 0 .. 448
        self.cache = [
            image(c[:cached], o, cached + spare, rubbish)
            for c, o in zip(self.codes[1:], self.offsets, strict=True)
        ]
        self.block = [
            image(c[cached:], o) for c, o in zip(self.codes[1:], self.offsets, strict=True)
        ]
        self.rows = (
            torch.arange(tokens) if tokens <= ROWS else torch.linspace(0, tokens - 1, ROWS).long()
        )
        self.rows = self.rows.to(device)

    def pack(self, run: Run) -> list[Tensor]:
        """Block images by the kernel."""
        made = [torch.full_like(x, 0x7F) for x in self.block]
        own = [x[self.cached :].contiguous() for x in (self.k, self.v)]
        run(
            "aapt_pack",
            [*own, self.scales.k, self.scales.k_mean, self.scales.v],
            (self.tokens, self.heads),
            made,
        )
        return made

    def attend(self, run: Run) -> Tensor:
        """[T, H, D] by the kernel."""
        out = torch.full_like(self.q, float("nan"))
        length = torch.tensor([self.cached], dtype=torch.int32, device=self.device)
        s = self.scales
        run(
            "aapt_attend",
            [self.q, *self.block, *self.cache, length, s.q, s.k, s.v],
            (self.tokens, self.heads, self.cache[0].shape[1]),
            [out],
        )
        return out

    def commit(self, run: Run, slot: int) -> bool:
        """Whether the kernel's commit to `slot` moves the block there, and nothing else."""
        want, made = [x.clone() for x in self.cache], [x.clone() for x in self.cache]
        capacity = want[0].shape[1] * TILE_KEYS
        if 0 <= slot <= capacity - self.tokens:
            for target, codes, offsets in zip(want, self.codes[1:], self.offsets, strict=True):
                token = torch.arange(slot, slot + self.tokens, device=self.device)
                index = (token // TILE_KEYS * TILE_KEYS * self.dim)[:, None] + torch.from_numpy(
                    offsets
                ).to(self.device)[token % TILE_KEYS]
                target.view(self.heads, -1)[:, index] = (
                    codes[self.cached :].view(torch.uint8).transpose(0, 1)
                )
        where = torch.tensor([slot], dtype=torch.int32, device=self.device)
        run("aapt_commit", [*self.block, where], (self.tokens, self.heads, want[0].shape[1]), made)
        return all(torch.equal(a, b) for a, b in zip(made, want, strict=True))

    @cached_property
    def exact(self) -> Tensor:
        """float64 attention over the inputs before quantisation, of `rows`."""
        return exact(self.q[self.rows], self.k, self.v)

    @cached_property
    def model(self) -> Tensor:
        """Compute the kernel's arithmetic with exact sums in the tensor cores, of `rows`.

        float32 [R, H, D] before the rounding to bf16.
        """
        q8, k8, v8 = (x.double() for x in self.codes)
        q8, k8, v8 = (
            q8[self.rows].transpose(0, 1),
            k8.transpose(0, 1),
            v8.transpose(0, 1),
        )  # [H, n, D]
        c = (self.scales.q * self.scales.k * (softmax_scale(self.dim) * 1.4426950408889634))[
            :, None, None
        ]
        shape = (self.heads, len(self.rows), 1)
        maximum, total = (
            torch.full(shape, -torch.inf, device=self.device),
            torch.zeros(shape, device=self.device),
        )
        acc = torch.zeros((*shape[:2], self.dim), device=self.device)
        segments = ((self.cached, self.tokens), (0, self.cached))
        for first, last in [
            (begin + tile * TILE_KEYS, begin + min(length, (tile + 1) * TILE_KEYS))
            for begin, length in segments for tile in reversed(range(tiles(length)))
        ]:  # fmt: skip
            scores = (q8 @ k8[:, first:last].transpose(1, 2)).float()  # [H, R, 64]
            higher = torch.maximum(maximum, scores.amax(-1, keepdim=True))
            rescale, p = torch.exp2((maximum - higher) * c), torch.exp2((scores - higher) * c + 8)
            maximum, total = higher, total * rescale + p.sum(-1, keepdim=True)
            acc = acc * rescale + (e4m3(p).double() @ v8[:, first:last]).float()
        return (acc * self.scales.v[:, None] / total).transpose(0, 1)

    def check(self, run: Run) -> dict[str, object]:
        """Measure the errors of one launch and judge them.

        Accumulators with fewer bits than the model's exact ones may cost a fifth.
        """
        out = self.attend(run)
        again = self.attend(run)
        found, modelled = rmse(out[self.rows], self.exact), rmse(self.model, self.exact)
        return {
            "error": found, "error_of_model": modelled,
            "from_model": rmse(out[self.rows], self.model), "finite": bool(out.isfinite().all()),
            "same_twice": torch.equal(out, again),
            "ok": bool(out.isfinite().all())
            and torch.equal(out, again)
            and found <= 1.2 * modelled + 1e-3,
        }  # fmt: skip


class Stream:
    """A stream's cache and one step over it, launched or replayed.

    Every step reads its length and slot from the same two device integers.
    """

    def __init__(
        self, run: Run, ring: Ring, blocks: int, heads: int, dim: int, seed: int, device: str
    ) -> None:
        self.run, self.ring, self.heads = run, ring, heads
        text, width = ring.text_tokens, ring.block_tokens
        self.q, k, v = draw("plain", blocks * width, text, heads, dim, seed, device)
        self.scales = Scales.of(self.q, k, v)
        starts = [text + block * width for block in range(blocks)]
        self.text = [x[:text].contiguous() for x in (k, v)]
        self.keys, self.values = (
            [x[at : at + width].contiguous() for at in starts] for x in (k, v)
        )
        bytes_ = lambda tokens: [
            torch.zeros((heads, tiles(tokens), TILE_KEYS * dim), dtype=torch.uint8, device=device)
            for _ in range(2)
        ]
        self.cache, self.block = bytes_(ring.tokens), bytes_(width)
        self.static = [torch.zeros_like(x) for x in (self.q[:width], self.keys[0], self.values[0])]
        self.out = torch.zeros_like(self.static[0])
        self.cache_len, self.slot = (
            torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2)
        )
        if text:
            self.keep(*self.text, bytes_(text))

    def keep(self, k: Tensor, v: Tensor, block: list[Tensor]) -> None:
        """Pack and commit at `slot`."""
        s, tokens = self.scales, len(k)
        self.run("aapt_pack", [k, v, s.k, s.k_mean, s.v], (tokens, self.heads), block)
        self.run(
            "aapt_commit",
            [*block, self.slot],
            (tokens, self.heads, self.cache[0].shape[1]),
            self.cache,
        )

    def launch(self) -> None:
        """One step: pack, attend, commit."""
        s, (q, k, v) = self.scales, self.static
        numbers = (len(q), self.heads, self.cache[0].shape[1])
        self.run("aapt_pack", [k, v, s.k, s.k_mean, s.v], numbers[:2], self.block)
        self.run(
            "aapt_attend",
            [q, *self.block, *self.cache, self.cache_len, s.q, s.k, s.v],
            numbers,
            [self.out],
        )
        self.run("aapt_commit", [*self.block, self.slot], numbers, self.cache)

    def errors(self, step: Callable[[], None]) -> list[float]:
        """Measure the error of every block after `step`.

        `step` is `launch`, or the replay of a graph that holds it. The error is that against
        float64 attention over what the ring shows the block.
        """
        found, width = [], self.ring.block_tokens
        for block in range(len(self.keys)):
            place, own = self.ring.place(block), self.q[block * width : (block + 1) * width]
            for static, now in zip(
                self.static, (own, self.keys[block], self.values[block]), strict=True
            ):
                static.copy_(now)
            self.cache_len.fill_(place.cache_len)
            self.slot.fill_(place.slot)
            step()
            seen = self.ring.visible(block)
            k, v = (
                torch.cat([text, *(past[i] for i in seen)])
                for text, past in zip(self.text, (self.keys, self.values), strict=True)
            )
            found.append(rmse(self.out, exact(own, k, v)))
        return found


def replayed(stream: Stream) -> Callable[[], None]:
    """One step of `stream` as a captured graph."""
    graph = torch.cuda.CUDAGraph()
    before = [x.clone() for x in stream.cache]
    stream.launch()  # loads what is loaded lazily
    torch.cuda.synchronize()
    for cache, old in zip(stream.cache, before, strict=True):
        cache.copy_(old)
    with torch.cuda.graph(graph):
        stream.launch()
    return graph.replay


# Every shape of ring: no text, no sink, neither, both; blocks that are tiles and blocks that are
# not; one place only.
RINGS = (
    Ring(0, 64, 0, 2),
    Ring(7, 65, 1, 2),
    Ring(16, 50, 0, 3),
    Ring(0, 70, 1, 1),
    Ring(64, 128, 2, 2),
)
