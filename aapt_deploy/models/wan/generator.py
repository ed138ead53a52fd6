"""Generate a block of latent frames per pass: the causal transformer of Wan2.1's students.

One class for Self-Forcing, Causal-Forcing, LongLive and CausVid, whose networks are the same. A
pass embeds n latent frames as tokens. Each block of layers attends to the cache and the block
itself, then to the text. The output is a velocity; the clean latent is noisy - time x velocity.

    x += gate . attention(LN(x) (1 + scale) + shift)       modulation by time, six vectors a block
    x += cross-attention(LN(x))                            512 text vectors, no mask
    x += gate . MLP(LN(x) (1 + scale) + shift)

q and k are normalised by RMS over all heads together. Their rows come in half-split order, so the
rotation and the kernels are those of every family (`keys` permutes them at import).

Letters: n latent frames, C latent channels, h x w latent pixels, F tokens per frame, N = n F,
L text tokens, H heads, D head_dim.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aapt_deploy.models.rotary import join_rope, rotate
from aapt_deploy.models.wan.rope import TIME_FEATURES, angles, cos_sin, rope_pairs
from aapt_deploy.ops.block_causal_attention.torch_op import block_causal_attention
from aapt_deploy.profiles import Profile

EPS = 1e-6
MODULATIONS = 6  # shift, scale, gate for attention and again for the MLP


def spatial_rope(profile: Profile) -> Tensor:
    """Return cosine and sine of a frame's spatial angles: float32 [2, F, P_height + P_width]."""
    patch, (_, height, width) = profile.model.patch, rope_pairs(profile)
    rows, columns = profile.latent_height // patch, profile.latent_width // patch
    down = np.broadcast_to(angles(np.arange(rows), height)[:, None], (rows, columns, height))
    along = np.broadcast_to(angles(np.arange(columns), width)[None], (rows, columns, width))
    both = np.concatenate([down, along], axis=-1).reshape(rows * columns, height + width)
    return torch.tensor(cos_sin(both, axis=0))  # not from_numpy, which ignores the default device


def layer_norm(x: Tensor) -> Tensor:
    """Normalise the last dimension, without weights."""
    return F.layer_norm(x, (x.shape[-1],), eps=EPS)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Normalise the last dimension by its RMS."""
    return F.rms_norm(x, (x.shape[-1],), eps=EPS) * weight


class Block(nn.Module):
    """Self-attention over the cache, cross-attention to the text, MLP."""

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        dim, self.heads = profile.model.dim, profile.model.heads
        self.modulation = nn.Parameter(torch.zeros(MODULATIONS, dim))
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.norm_text, self.bias_text = (
            nn.Parameter(torch.ones(dim)),
            nn.Parameter(torch.zeros(dim)),
        )
        self.text_q, self.text_k = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.text_v, self.text_out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_text_q = nn.Parameter(torch.ones(dim))
        self.norm_text_k = nn.Parameter(torch.ones(dim))
        self.w1, self.w2 = nn.Linear(dim, profile.ffn_dim), nn.Linear(profile.ffn_dim, dim)

    def text(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Turn text vectors [1, L, dim] into keys and values [1, L, H, D]."""
        keys = rms_norm(self.text_k(vectors), self.norm_text_k)
        return self._heads(keys), self._heads(self.text_v(vectors))

    def forward(
        self, x: Tensor, shared: Tensor, rope: Tensor, k_cache: Tensor, v_cache: Tensor,
        cache_len: Tensor, text_k: Tensor, text_v: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Pass tokens x [1, N, dim]; return them, and keys and values [1, N, H, D] to commit.

        shared: modulation by time [1, 6, dim]. rope [1, 2, N, P]. Caches and text as in the graph.
        """
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (self.modulation + shared)[
            :, :, None
        ].unbind(1)  # [1, 1, dim] each
        q, k, v = self.qkv(layer_norm(x) * (1 + scale) + shift).chunk(3, dim=-1)
        q = rotate(self._heads(rms_norm(q, self.norm_q)), rope)
        k = rotate(self._heads(rms_norm(k, self.norm_k)), rope)
        v = self._heads(v).contiguous()
        attended, k, v = block_causal_attention(q, k, v, k_cache, v_cache, cache_len)
        x = x + gate * self.out(attended.flatten(-2))
        x = x + self._to_text(x, text_k, text_v)
        y = layer_norm(x) * (1 + scale_mlp) + shift_mlp
        x = x + gate_mlp * self.w2(F.gelu(self.w1(y), approximate="tanh"))
        return x, k, v

    def _to_text(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend from tokens x [1, N, dim] to the text's keys and values [1, L, H, D]."""
        y = layer_norm(x) * self.norm_text + self.bias_text
        q = self._heads(rms_norm(self.text_q(y), self.norm_text_q))
        q, keys, values = (z.transpose(1, 2) for z in (q, keys, values))  # [1, H, N or L, D]
        attended = F.scaled_dot_product_attention(q, keys, values)
        result: Tensor = self.text_out(attended.transpose(1, 2).flatten(-2))
        return result

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.heads, -1))
        return heads


class Generator(nn.Module):
    STEP = "blocks"  # the stack of blocks that a pass runs
    spatial_rope: Tensor  # a buffer

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        self.profile = profile
        m, channels = profile.model, profile.video.latent_channels
        wide = nn.Linear(profile.text.dim, m.dim)
        self.text_in = nn.Sequential(wide, nn.GELU(approximate="tanh"), nn.Linear(m.dim, m.dim))
        self.visual_in = nn.Conv2d(channels, m.dim, m.patch, stride=m.patch)
        first, second = nn.Linear(TIME_FEATURES, m.dim), nn.Linear(m.dim, m.dim)
        self.time_in = nn.Sequential(first, nn.SiLU(), second)
        self.time_modulation = nn.Linear(m.dim, MODULATIONS * m.dim)
        self.blocks = cast("Sequence[Block]", nn.ModuleList(Block(profile) for _ in range(m.depth)))
        self.modulation = nn.Parameter(torch.zeros(2, m.dim))  # shift and scale of the head
        self.head = nn.Linear(m.dim, m.patch**2 * channels)
        self.register_buffer("spatial_rope", spatial_rope(profile), persistent=False)

    def prompt_parameters(self) -> set[str]:
        """Return the names of the parameters that only the prompt graph reads."""
        only = ("text_in", "text_k", "text_v", "norm_text_k")
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if not set(name.split(".")).isdisjoint(only)}

    def prompt(self, text: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return per-layer text keys and values [1, L, H, D] for vectors [1, L, text.dim]."""
        vectors = self.text_in(text)
        pairs = [block.text(vectors) for block in self.blocks]
        return [k for k, _ in pairs], [v for _, v in pairs]

    def velocity(
        self, noisy: Tensor, time_features: Tensor, rope_time: Tensor, cache_len: Tensor,
        caches: Sequence[tuple[Tensor, Tensor]], text: Sequence[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
        """Return the velocity [n, C, h, w], and the keys and values to commit.

        noisy [n, C, h, w]; time_features [1, 256]; rope_time [1, 2, n, P_time]; cache_len int32
        [1]; per layer: keys and values of the cache [1, S, H, D] and of the text [1, L, H, D].
        """
        x = self.visual_in(noisy).flatten(2).transpose(1, 2).flatten(0, 1)[None]  # [1, N, dim]
        rope = join_rope(rope_time.transpose(1, 2), self.spatial_rope)  # [1, n, 2, F, P]
        rope = rope.transpose(1, 2).flatten(2, 3)  # [1, 2, N, P]
        features = self.time_in(time_features)  # [1, dim]
        shared = self.time_modulation(F.silu(features)).unflatten(1, (MODULATIONS, -1))
        keys, values = [], []
        for block, cache, words in zip(self.blocks, caches, text, strict=True):
            x, k, v = block(x, shared, rope, *cache, cache_len, *words)
            keys.append(k)
            values.append(v)
        shift, scale = (self.modulation + features[:, None])[:, :, None].unbind(1)
        y = self.head(layer_norm(x) * (1 + scale) + shift)  # [1, N, patch * patch * C]
        patch, n = self.profile.model.patch, len(noisy)
        rows = self.profile.latent_height // patch
        y = y[0].unflatten(1, (patch, patch, -1)).unflatten(0, (n, rows, -1))  # [n, r, c, p, p, C]
        return y.permute(0, 5, 1, 3, 2, 4).reshape(noisy.shape), keys, values
