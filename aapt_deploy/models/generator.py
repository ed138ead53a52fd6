"""The AAPT generator: a text + visual MMDiT that makes one latent frame per pass (Seaweed-APT2, section 2.1 and App. A).

Text tokens attend to text. The visual tokens of a block attend to the text, the sink block, the window of past blocks and themselves. The
input is the channel concat of the noisy latent, the previous latent frame (recycled) and the camera condition.

Two ways to run the same weights, equal to 1e-5 in fp32:
    forward   many blocks at once under a block-causal mask, for training
    step      one block against the KV cache, for inference; this is what gets exported

The pass returns the clean latent; its velocity is (noisy - clean) / t, so at t = 1 the pass is APT's G(z) = z - v(z, 1). What the network itself
predicts is the rest that a still picture leaves over: `posterior` says what is known from the previous frame and the noisy latent alone.

Letters: B batch, n blocks, C latent channels, h x w latent pixels, F tokens per frame, L text tokens, H heads, D head_dim.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aapt_deploy.models.layers import MODULATIONS, TIME_FEATURES, Stream, join_rope, posterior, rms_norm, rotate, spatial_rope, time_features
from aapt_deploy.ops.block_causal_attention import Ring
from aapt_deploy.ops.block_causal_attention.torch_op import block_causal_attention
from aapt_deploy.profiles import CONDITION_CHANNELS, Profile
from aapt_deploy.prompts import VOCABULARY_SIZE

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q, k, v -> attended, each [B, N, H, D]


class Generator(nn.Module):
    spatial_rope: Tensor  # a buffer
    step_spread: Tensor  # [C, 1, 1]: deviation of each latent channel around the frame before; measured on the data, kept with the weights

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        self.profile = profile
        m, patch = profile.model, profile.model.patch**2
        channels = profile.video.latent_channels
        if profile.text.kind == "vocabulary":
            self.vocabulary = nn.Embedding(VOCABULARY_SIZE, profile.text.dim)
        self.text_in = nn.Linear(profile.text.dim, m.dim)
        size = m.patch + 2 * m.halo
        self.visual_in = nn.Conv2d(2 * channels + CONDITION_CHANNELS, m.dim, size, stride=m.patch, padding=m.halo)
        self.time_in = nn.Sequential(nn.Linear(TIME_FEATURES, m.dim), nn.SiLU(), nn.Linear(m.dim, m.dim), nn.SiLU())
        self.time_modulation = nn.Linear(m.dim, MODULATIONS * m.dim)
        self.time_out = nn.Linear(m.dim, 2 * m.dim)
        self.text = _streams(Stream(profile, ends_at_attention=i == m.depth - 1) for i in range(m.depth))
        self.visual = _streams(Stream(profile) for _ in range(m.depth))
        self.visual_out = nn.ConvTranspose2d(m.dim, channels, size, stride=m.patch, padding=m.halo)  # with a halo, patches overlap and blend
        # What a linear predictor can do need not be learned by the blocks.
        self.skip = nn.Conv2d(2 * channels + CONDITION_CHANNELS, channels * patch, size, stride=m.patch, padding=m.halo, bias=False)
        self.register_buffer("spatial_rope", spatial_rope(profile), persistent=False)
        self.register_buffer("step_spread", torch.full((channels, 1, 1), 0.5))
        self._start()

    def _start(self) -> None:
        """Initial weights: residual branches shrink with depth, modulation and the head start at zero."""
        for layer in (*self.text, *self.visual):
            for name in ("out", "w2"):
                if hasattr(layer, name):
                    nn.init.normal_(getattr(layer, name).weight, std=0.02 / (2 * self.profile.model.depth) ** 0.5)
        for head in (self.time_modulation, self.time_out, self.visual_out, self.skip):
            for parameter in head.parameters():
                nn.init.zeros_(parameter)

    # Text: computed once per prompt, then part of the cache.

    def prompt(self, text: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Per-layer text keys and values, each [B, L, H, D]. text: ids [B, L] or embeddings [B, L, text.dim]."""
        x = self.text_in(self.vocabulary(text) if self.profile.text.kind == "vocabulary" else text)  # [B, L, dim]
        keys, values = [], []
        for layer in self.text:
            table = layer.modulation.unbind(0)
            q, k, v = layer.project(x, *table[:2])
            keys.append(k)
            values.append(v)
            if len(table) == MODULATIONS:
                attended = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
                x = layer.finish(x, attended, list(table[2:]))
        return keys, values

    # Visual: patches in, patches out.

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input [N, channels, h, w] -> tokens [N, F, dim] and the linear predictor's latent [N, C, h, w]."""
        tokens = self.visual_in(x).flatten(2).transpose(1, 2)
        return tokens, F.pixel_shuffle(self.skip(x), self.profile.model.patch)

    def _latent(self, tokens: Tensor) -> Tensor:
        """Tokens [N, F, dim] -> latent [N, C, h, w]."""
        rows = self.profile.latent_height // self.profile.model.patch
        latent: Tensor = self.visual_out(tokens.transpose(1, 2).unflatten(2, (rows, -1)))
        return latent

    def _times(self, t: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """t [...] -> the shared modulation, six of [..., dim], and the head's shift and scale [..., dim]."""
        features = self.time_in(time_features(t))
        return list(self.time_modulation(features).chunk(MODULATIONS, dim=-1)), list(self.time_out(features).chunk(2, dim=-1))

    def forward(self, noisy: Tensor, previous: Tensor, condition: Tensor, t: Tensor, text: Tensor, rope_time: Tensor) -> Tensor:
        """The clean latents of n blocks under the block-causal mask.

        noisy, previous [B, n, C, h, w]; condition [B, n, 6, h, w]; t [B, n] in (0, 1]; text as in `prompt`; rope_time [B, n, 2, P_time] of
        the blocks' absolute indices (`rope.temporal_rope`). The first block is the sink of the others. Returns [B, n, C, h, w].
        """
        b, n = noisy.shape[:2]
        f = self.profile.frame_tokens
        keys, values = self.prompt(text)
        rope = join_rope(rope_time, self.spatial_rope).transpose(1, 2).flatten(2, 3)  # [B, 2, n*F, P]
        mask = self._mask(n, noisy.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = torch.cat([keys[layer], k], dim=1), torch.cat([values[layer], v], dim=1)  # [B, L + n*F, H, D]
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2).to(q.dtype), v.transpose(1, 2), attn_mask=mask)
            return out.transpose(1, 2)

        innovation, base, spread = posterior(noisy, previous, t[..., None, None, None], self.step_spread)
        x, direct = self._embed(torch.cat([innovation, previous, condition], dim=2).flatten(0, 1))  # [B*n, F, dim], [B*n, C, h, w]
        x = x.unflatten(0, (b, n)).flatten(1, 2)  # [B, n*F, dim]
        shared, head = ([m.repeat_interleave(f, dim=1) for m in group] for group in self._times(t))  # [B, n, dim] -> [B, n*F, dim]
        x = self._run(x, shared, head, rope, attend).unflatten(1, (n, f)).flatten(0, 1)  # [B*n, F, dim]
        clean: Tensor = base + spread * (self._latent(x) + direct).unflatten(0, (b, n))
        return clean

    def step(self, noisy: Tensor, previous: Tensor, condition: Tensor, t: Tensor, rope_time: Tensor, k_cache: list[Tensor],
             v_cache: list[Tensor], cache_len: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
        """The clean latent of one block, and the keys and values to commit to its slot.

        noisy, previous [1, C, h, w]; condition [1, 6, h, w]; t [1]; rope_time [1, 2, P_time]; per-layer caches [1, S, H, D], read only;
        cache_len int32 [1], valid cache tokens. Returns clean [1, C, h, w] and per-layer k, v [1, F, H, D]. Training runs B streams in lockstep
        through it: B in the place of every 1 but that of cache_len.
        """
        rope = join_rope(rope_time, self.spatial_rope)  # [1, 2, F, P]
        k_blocks: list[Tensor] = []
        v_blocks: list[Tensor] = []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, k_block, v_block = block_causal_attention(q, k, v, k_cache[layer], v_cache[layer], cache_len)
            k_blocks.append(k_block)
            v_blocks.append(v_block)
            return out

        innovation, base, spread = posterior(noisy, previous, t[:, None, None, None], self.step_spread)
        x, direct = self._embed(torch.cat([innovation, previous, condition], dim=1))  # [1, F, dim], [1, C, h, w]
        shared, head = ([m[:, None] for m in group] for group in self._times(t))  # [1, 1, dim] each
        return base + spread * (self._latent(self._run(x, shared, head, rope, attend)) + direct), k_blocks, v_blocks

    def _run(self, x: Tensor, shared: list[Tensor], head: list[Tensor], rope: Tensor, attend: Attend) -> Tensor:
        """The blocks and the head's norm: tokens [B, N, dim] -> tokens [B, N, dim]."""
        for i, layer in enumerate(self.visual):
            modulation = [m + own for m, own in zip(shared, layer.modulation.unbind(0), strict=True)]
            q, k, v = layer.project(x, *modulation[:2])
            x = layer.finish(x, attend(i, rotate(q, rope), rotate(k, rope), v), modulation[2:])
        shift, scale = head
        return rms_norm(x) * (1 + scale) + shift

    def _mask(self, n: int, device: torch.device) -> Tensor:
        """Block-causal mask with window and sink, True where a query may look: bool [n*F, L + n*F]."""
        ring, f = Ring.of(self.profile), self.profile.frame_tokens
        blocks = torch.zeros(n, n, dtype=torch.bool, device=device)
        for i in range(n):
            blocks[i, ring.visible(i)] = True
        visual = blocks.repeat_interleave(f, dim=0).repeat_interleave(f, dim=1)  # [n*F, n*F]
        return F.pad(visual, (self.profile.text.tokens, 0), value=True)


def _streams(streams: Iterable[Stream]) -> Sequence[Stream]:
    """A ModuleList, typed by what it holds."""
    return cast("Sequence[Stream]", nn.ModuleList(streams))
