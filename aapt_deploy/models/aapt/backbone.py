"""Run the transformer that generator and discriminator share.

It has the text and the visual stream, the embedding of a block, and block-causal attention. Text
tokens attend to text. The visual tokens of a block attend to the text, the sink block, the window
of past blocks and themselves. `Generator` and `Discriminator` add their heads.

Letters: B batch, n blocks, C latent channels, h x w latent pixels, F tokens per frame,
L text tokens, H heads, D head_dim.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aapt_deploy.models.aapt import layers
from aapt_deploy.models.aapt.context import Context
from aapt_deploy.models.aapt.layers import MODULATIONS, TIME_FEATURES, Stream, spatial_rope
from aapt_deploy.models.aapt.prompts import VOCABULARY_SIZE
from aapt_deploy.ops.block_causal_attention import Ring
from aapt_deploy.ops.block_causal_attention.torch_op import softmax_attention
from aapt_deploy.profiles import CONDITION_CHANNELS, Profile

# The layer's index, then as `layers.Attend`.
AttendLayer = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


class Backbone(nn.Module):
    spatial_rope: Tensor  # a buffer
    step_spread: Tensor  # [C, 1, 1]: channels' deviation around the frame before, from the data
    checkpointing = False  # recompute visual blocks in the backward pass, to save memory
    context: Context | None = None  # the processes that share each batch

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        self.profile = profile
        m, channels = profile.model, profile.video.latent_channels
        inputs, size = 2 * channels + CONDITION_CHANNELS, m.patch + 2 * m.halo
        if profile.text.kind == "vocabulary":
            self.vocabulary = nn.Embedding(VOCABULARY_SIZE, profile.text.dim)
        self.text_in = nn.Linear(profile.text.dim, m.dim)
        self.visual_in = nn.Conv2d(inputs, m.dim, size, stride=m.patch, padding=m.halo)
        first, second = nn.Linear(TIME_FEATURES, m.dim), nn.Linear(m.dim, m.dim)
        self.time_in = nn.Sequential(first, nn.SiLU(), second, nn.SiLU())
        self.time_modulation = nn.Linear(m.dim, MODULATIONS * m.dim)
        self.text = _streams(Stream(profile, i == m.depth - 1) for i in range(m.depth))
        self.visual = _streams(Stream(profile) for _ in range(m.depth))
        self.register_buffer("spatial_rope", spatial_rope(profile), persistent=False)
        self.register_buffer("step_spread", torch.full((channels, 1, 1), 0.5))
        for layer in (*self.text, *self.visual):  # residual branches shrink with depth
            for name in ("out", "w2"):
                if hasattr(layer, name):
                    nn.init.normal_(getattr(layer, name).weight, std=0.02 / (2 * m.depth) ** 0.5)
        for parameter in self.time_modulation.parameters():
            nn.init.zeros_(parameter)

    # Text: computed once per prompt, then part of the cache.

    def prompt(self, text: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return per-layer text keys and values, each [B, L, H, D], of this process's heads.

        text: ids [B, L] or embeddings [B, L, text.dim].
        """
        spoken = self.profile.text.kind == "vocabulary"
        x = self.text_in(self.vocabulary(text) if spoken else text)  # [B, L, dim]
        keys, values = [], []
        for layer in self.text:
            x, k, v = layer(x, None, None, _among_text)
            keys.append(k if self.context is None else self.context.heads(k))
            values.append(v if self.context is None else self.context.heads(v))
        return keys, values

    # Visual: tokens in, tokens out.

    def _modulation(self, t: Tensor) -> tuple[list[Tensor], Tensor]:
        """Turn t [...] into the shared modulation, six of [..., dim], and features [..., dim]."""
        features = self.time_in(layers.time_features(t))
        return list(self.time_modulation(features).chunk(MODULATIONS, dim=-1)), features

    def _blocks(
        self, x: Tensor, shared: list[Tensor], rope: Tensor, attend: AttendLayer
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield tokens x [B, N, dim] after each visual block, and what else `attend` returned.

        The tokens are this process's. `_all_tokens` collects those of all processes.
        """
        if self.context is not None:
            f, whole = self.profile.frame_tokens, attend
            self.context.check(self.profile.model.heads, f)
            x, rope = self.context.part(x, f), self.context.part(rope, f, dim=2)
            shared = [self.context.part(m, f) for m in shared]
            attend = partial(self._attend_by_heads, self.context, whole)
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        for i, layer in enumerate(self.visual):
            recompute = self.checkpointing and torch.is_grad_enabled()
            run: Callable[..., tuple[Tensor, ...]] = partial(again, layer) if recompute else layer
            out = run(x, shared, rope, partial(attend, i))
            yield out
            x = out[0]

    def _attend_by_heads(
        self, context: Context, attend: AttendLayer, layer: int, *qkv: Tensor
    ) -> tuple[Tensor, ...]:
        f = self.profile.frame_tokens
        attended, *kept = attend(layer, *(context.to_heads(x, f) for x in qkv))
        return (context.to_tokens(attended, f), *kept)

    def _all_tokens(self, x: Tensor) -> Tensor:
        """Turn tokens as `_blocks` yields them into [B, N, dim]."""
        return x if self.context is None else self.context.whole(x, self.profile.frame_tokens)

    def _attend_to_clip(self, text: Tensor, n: int, bidirectional: bool = False) -> AttendLayer:
        """Return the attention of n whole blocks at once, or over all tokens if `bidirectional`.

        text as in `prompt`. The loop computes only what each block's window shows (as in AAPT
        App. A); a mask would compute the rest as well.
        """
        keys, values = self.prompt(text)
        ring, f = Ring.of(self.profile), self.profile.frame_tokens

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            both = (q, k, v, keys[layer], values[layer])
            q, k, v, text_k, text_v = (x.to(q.dtype).transpose(1, 2) for x in both)  # [B, H, N, D]
            if bidirectional:
                all_k, all_v = torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2)
                return (softmax_attention(q, all_k, all_v).transpose(1, 2),)
            blocks_q, blocks_k, blocks_v = (x.split(f, dim=2) for x in (q, k, v))
            out = []
            for i in range(n):
                near_k = torch.cat([text_k, *(blocks_k[j] for j in ring.visible(i))], dim=2)
                near_v = torch.cat([text_v, *(blocks_v[j] for j in ring.visible(i))], dim=2)
                out.append(softmax_attention(blocks_q[i], near_k, near_v))  # [B, H, F, D]
            return (torch.cat(out, dim=2).transpose(1, 2),)

        return attend


def _among_text(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Attend from text to text, and return its keys and values as well."""
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, L, D]
    attended = F.scaled_dot_product_attention(queries, keys, values)
    return attended.transpose(1, 2), k, v.contiguous()


def _streams(streams: Iterable[Stream]) -> Sequence[Stream]:
    """Return a ModuleList, typed by its items."""
    return cast("Sequence[Stream]", nn.ModuleList(streams))
