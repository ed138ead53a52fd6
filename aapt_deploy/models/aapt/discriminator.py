"""The AAPT discriminator: the generator's backbone with a logit per frame (Seaweed-APT2, section 2.2).

It starts from the weights of the diffusion adaptation and sees a whole segment in one pass. A block's noise slot holds the frame itself, its
recycled slot the frame before, and its condition is the one that led to it: what the generator was given together with that frame. Noise slots are
scaled as the generator's are at t = 0 (`layers.posterior`), because that is what the weights know; the map is invertible, so the latents are raw.
Frame 0, which was given, has no logit. Blocks are numbered from the start of the segment: where in a stream a segment was cut out must not tell.

Heads as in APT (2501.08316): learnable queries attend to the tokens after 16, 26 and 36 of 36 blocks, and what they find becomes a logit. With
`attention="causal"` and `logits="frame"`, the paper's, logit i judges frames 0..i. "bidirectional" lets every block see all others, and "clip" asks
one query for the whole segment: answers to the finding that a causal judge of frames rewards still pictures (AAD-1, 2606.03972).

Letters as in backbone.py.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aapt_deploy.models.aapt.backbone import Backbone
from aapt_deploy.models.aapt.generator import Generator
from aapt_deploy.models.aapt.layers import join_rope, rms_norm
from aapt_deploy.models.aapt.rope import temporal_rope
from aapt_deploy.profiles import Profile

ATTENTION = ("causal", "bidirectional")
LOGITS = ("frame", "clip")
TAPS = (16 / 36, 26 / 36, 1.0)  # depths that are looked at, as parts of the whole


class Query(nn.Module):
    """One learnable query over tokens [N, T, dim], for each of N groups: [N, dim]."""

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        m = profile.model
        self.query = nn.Parameter(torch.randn(m.heads, 1, profile.head_dim))
        self.kv = nn.Linear(m.dim, 2 * m.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads, _, dim = self.query.shape
        k, v = self.kv(rms_norm(x)).unflatten(-1, (2, heads, dim)).permute(2, 0, 3, 1, 4)  # [N, H, T, D] each
        return F.scaled_dot_product_attention(self.query.to(k.dtype).expand(len(x), -1, -1, -1), k, v).flatten(1)  # [N, H, 1, D] -> [N, dim]


class Discriminator(Backbone):
    def __init__(self, profile: Profile, attention: str = "causal", logits: str = "frame") -> None:
        super().__init__(profile)
        assert attention in ATTENTION and logits in LOGITS, f"{attention=} {logits=}"
        self.attention, self.logits = attention, logits
        depth = profile.model.depth
        self.taps = sorted({max(1, round(part * depth)) for part in TAPS})  # a shallow one has fewer
        self.queries = nn.ModuleList(Query(profile) for _ in self.taps)
        self.logit = nn.Linear(len(self.taps) * profile.model.dim, 1)
        nn.init.normal_(self.logit.weight, std=0.02)
        nn.init.zeros_(self.logit.bias)

    def start_from(self, generator: Generator) -> None:
        """Take the backbone's weights from a generator; the heads keep theirs."""
        held = generator.state_dict()
        own = self.state_dict()
        self.load_state_dict({name: held.get(name, own[name]) for name in own})

    def forward(self, frames: Tensor, condition: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Logits [B, n] of the frames after the first, or [B, 1] of the clip; more is more real. Float32 also under autocast.

        frames [B, 1 + n, C, h, w], the given one first; condition [B, n, 6, h, w] of the steps between them; t [B], the time that the network is
        told, any in [0, 1] (AAPT draws it at random); text as in `prompt`.
        """
        b, n, f = frames.shape[0], frames.shape[1] - 1, self.profile.frame_tokens
        before, after = frames[:, :-1], frames[:, 1:]
        x = torch.cat([(after - before) / self.step_spread, before, condition], dim=2)  # [B, n, channels, h, w]
        x = self.visual_in(x.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, (b, n)).flatten(1, 2)  # [B, n*F, dim]
        blocks = torch.from_numpy(temporal_rope(self.profile, np.arange(n))).to(x.device)
        rope = join_rope(blocks, self.spatial_rope).transpose(0, 1).flatten(1, 2)[None]  # [1, 2, n*F, P]
        shared, _ = self._modulation(t[:, None])
        attend = self._attend_to_clip(text, n, bidirectional=self.attention == "bidirectional")
        group = f if self.logits == "frame" else n * f
        found, queries = [], iter(self.queries)
        for depth, (tokens, *_) in enumerate(self._blocks(x, shared, rope, attend), start=1):
            if depth in self.taps:
                found.append(next(queries)(self._all_tokens(tokens).unflatten(1, (-1, group)).flatten(0, 1)))  # [B * groups, dim]
        with torch.autocast(x.device.type, enabled=False):  # what R1 and R2 compare differs in the last digits
            logits: Tensor = self.logit(rms_norm(torch.cat(found, dim=-1).float()))  # [B * groups, 1]
        return logits.view(b, -1)
