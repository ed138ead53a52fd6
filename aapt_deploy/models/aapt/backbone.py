"""What generator and discriminator have in common: the text and the visual stream, the embedding of a block, block-causal attention.

Text tokens attend to text. The visual tokens of a block attend to the text, the sink block, the window of past blocks and themselves. Nothing here
knows what comes out at the end: that is `Generator`'s and `Discriminator`'s.

Letters: B batch, n blocks, C latent channels, h x w latent pixels, F tokens per frame, L text tokens, H heads, D head_dim.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aapt_deploy.models.aapt.context import Context
from aapt_deploy.models.aapt.layers import MODULATIONS, TIME_FEATURES, Stream, spatial_rope, time_features
from aapt_deploy.models.aapt.prompts import VOCABULARY_SIZE
from aapt_deploy.ops.block_causal_attention import Ring
from aapt_deploy.ops.block_causal_attention.torch_op import softmax_attention
from aapt_deploy.profiles import CONDITION_CHANNELS, Profile

AttendLayer = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, ...]]  # layer, then as `layers.Attend`


class Backbone(nn.Module):
    spatial_rope: Tensor  # a buffer
    step_spread: Tensor  # [C, 1, 1]: deviation of each latent channel around the frame before; measured on the data, kept with the weights
    checkpointing = False  # recompute every visual block in the backward pass instead of keeping what is inside it
    context: Context | None = None  # the processes that share each batch

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        self.profile = profile
        m = profile.model
        channels = profile.video.latent_channels
        if profile.text.kind == "vocabulary":
            self.vocabulary = nn.Embedding(VOCABULARY_SIZE, profile.text.dim)
        self.text_in = nn.Linear(profile.text.dim, m.dim)
        self.visual_in = nn.Conv2d(2 * channels + CONDITION_CHANNELS, m.dim, m.patch + 2 * m.halo, stride=m.patch, padding=m.halo)
        self.time_in = nn.Sequential(nn.Linear(TIME_FEATURES, m.dim), nn.SiLU(), nn.Linear(m.dim, m.dim), nn.SiLU())
        self.time_modulation = nn.Linear(m.dim, MODULATIONS * m.dim)
        self.text = _streams(Stream(profile, ends_at_attention=i == m.depth - 1) for i in range(m.depth))
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
        """Per-layer text keys and values, each [B, L, H, D], of this process's heads. text: ids [B, L] or embeddings [B, L, text.dim]."""
        x = self.text_in(self.vocabulary(text) if self.profile.text.kind == "vocabulary" else text)  # [B, L, dim]
        keys, values = [], []
        for layer in self.text:
            x, k, v = layer(x, None, None, _among_text)
            keys.append(k if self.context is None else self.context.heads(k))
            values.append(v if self.context is None else self.context.heads(v))
        return keys, values

    # Visual: tokens in, tokens out.

    def _modulation(self, t: Tensor) -> tuple[list[Tensor], Tensor]:
        """t [...] -> the shared modulation, six of [..., dim], and the features [..., dim] it was made of."""
        features = self.time_in(time_features(t))
        return list(self.time_modulation(features).chunk(MODULATIONS, dim=-1)), features

    def _blocks(self, x: Tensor, shared: list[Tensor], rope: Tensor, attend: AttendLayer) -> Iterator[tuple[Tensor, ...]]:
        """Tokens x [B, N, dim] after each block of the visual stream, with whatever else `attend` returned there.

        The tokens are this process's; `_all_tokens` gives the others'.
        """
        if self.context is not None:
            f, whole = self.profile.frame_tokens, attend
            self.context.check(self.profile.model.heads, f)
            x, rope = self.context.part(x, f), self.context.part(rope, f, dim=2)
            shared = [self.context.part(m, f) for m in shared]
            attend = partial(self._attend_by_heads, self.context, whole)
        for i, layer in enumerate(self.visual):
            if self.checkpointing and torch.is_grad_enabled():
                out = checkpoint(layer, x, shared, rope, partial(attend, i), use_reentrant=False, preserve_rng_state=False)
            else:
                out = layer(x, shared, rope, partial(attend, i))
            yield out
            x = out[0]

    def _attend_by_heads(self, context: Context, attend: AttendLayer, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        f = self.profile.frame_tokens
        attended, *kept = attend(layer, *(context.to_heads(x, f) for x in (q, k, v)))
        return (context.to_tokens(attended, f), *kept)

    def _all_tokens(self, x: Tensor) -> Tensor:
        """Tokens as they come out of `_blocks` -> [B, N, dim]."""
        return x if self.context is None else self.context.whole(x, self.profile.frame_tokens)

    def _attend_to_clip(self, text: Tensor, n: int, bidirectional: bool = False) -> AttendLayer:
        """Attention of n whole blocks at once: block by block over what each may see, or, `bidirectional`, all over all. text as in `prompt`.

        A loop instead of a mask: what a window hides is not computed (AAPT App. A does the same).
        """
        keys, values = self.prompt(text)
        ring, f = Ring.of(self.profile), self.profile.frame_tokens

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            q, k, v, text_k, text_v = (x.transpose(1, 2) for x in (q, k.to(q.dtype), v.to(q.dtype), keys[layer], values[layer]))  # [B, H, N, D]
            text_k, text_v = text_k.to(q.dtype), text_v.to(q.dtype)
            if bidirectional:
                return (softmax_attention(q, torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2)).transpose(1, 2),)
            blocks_q, blocks_k, blocks_v = (x.split(f, dim=2) for x in (q, k, v))
            out = []
            for i in range(n):
                near_k, near_v = (torch.cat([t, *(x[j] for j in ring.visible(i))], dim=2) for t, x in ((text_k, blocks_k), (text_v, blocks_v)))
                out.append(softmax_attention(blocks_q[i], near_k, near_v))  # [B, H, F, D]
            return (torch.cat(out, dim=2).transpose(1, 2),)

        return attend


def _among_text(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Text attends to text; its keys and values come out."""
    attended = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    return attended, k, v.contiguous()


def _streams(streams: Iterable[Stream]) -> Sequence[Stream]:
    """A ModuleList, typed by what it holds."""
    return cast("Sequence[Stream]", nn.ModuleList(streams))
