"""Judge latents with a logit per frame (Seaweed-APT2, section 2.2).

The discriminator is the generator's backbone with other heads. It starts from the weights of the
diffusion adaptation and sees a whole segment in one pass. A block's noise slot has the frame
itself and its recycled slot the frame before. Its condition is the one that the generator got for
that frame. Noise slots are scaled as the generator's at t = 0 (`layers.posterior`), which its
weights were trained on. The map is invertible, so the latents are raw. Frame 0 is given and has no
logit. Blocks are numbered from the start of the segment: its place in the stream must not
influence the logit.

Heads are as in APT (2501.08316). Learnable queries attend to the tokens after 16, 26 and 36 of 36
blocks. A linear layer turns their results into a logit. With the paper's `attention="causal"` and
`logits="frame"`, logit i judges frames 0..i. With "bidirectional" every block sees all others, and
with "clip" one query judges the whole segment. A causal judge of frames was found to reward still
pictures (AAD-1, 2606.03972).

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
TAPS = (16 / 36, 26 / 36, 1.0)  # depths of the queries, as parts of the whole


class Query(nn.Module):
    """One learnable query over tokens [N, T, dim], for each of N groups: [N, dim]."""

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        m = profile.model
        self.query = nn.Parameter(torch.randn(m.heads, 1, profile.head_dim))
        self.kv = nn.Linear(m.dim, 2 * m.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads, _, dim = self.query.shape
        kv = self.kv(rms_norm(x)).unflatten(-1, (2, heads, dim))
        k, v = kv.permute(2, 0, 3, 1, 4)  # [N, H, T, D] each
        q = self.query.to(k.dtype).expand(len(x), -1, -1, -1)  # [N, H, 1, D]
        return F.scaled_dot_product_attention(q, k, v).flatten(1)


class Discriminator(Backbone):
    def __init__(self, profile: Profile, attention: str = "causal", logits: str = "frame") -> None:
        super().__init__(profile)
        assert attention in ATTENTION and logits in LOGITS, f"{attention=} {logits=}"
        self.attention, self.logits = attention, logits
        depth = profile.model.depth  # a shallow network has fewer taps
        self.taps = sorted({max(1, round(part * depth)) for part in TAPS})
        self.queries = nn.ModuleList(Query(profile) for _ in self.taps)
        self.logit = nn.Linear(len(self.taps) * profile.model.dim, 1)
        nn.init.normal_(self.logit.weight, std=0.02)
        nn.init.zeros_(self.logit.bias)

    def start_from(self, generator: Generator) -> None:
        """Copy the backbone's weights from a generator. The heads keep theirs."""
        given, own = generator.state_dict(), self.state_dict()
        self.load_state_dict({name: given.get(name, own[name]) for name in own})

    def forward(self, frames: Tensor, condition: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Return logits [B, n] of the frames after the first, or [B, 1] of the clip.

        More is more real. Logits are float32 also under autocast.
        frames [B, 1 + n, C, h, w], the given one first; condition [B, n, 6, h, w] of the steps
        between them; t [B], any time in [0, 1] (AAPT draws it at random); text as in `prompt`.
        """
        b, n, f = frames.shape[0], frames.shape[1] - 1, self.profile.frame_tokens
        before, after = frames[:, :-1], frames[:, 1:]
        # [B, n, channels, h, w]
        x = torch.cat([(after - before) / self.step_spread, before, condition], dim=2)
        x = self.visual_in(x.flatten(0, 1)).flatten(2).transpose(1, 2)  # [B*n, F, dim]
        x = x.unflatten(0, (b, n)).flatten(1, 2)  # [B, n*F, dim]
        blocks = torch.from_numpy(temporal_rope(self.profile, np.arange(n))).to(x.device)
        rope = join_rope(blocks, self.spatial_rope)  # [n, 2, F, P]
        rope = rope.transpose(0, 1).flatten(1, 2)[None]  # [1, 2, n*F, P]
        shared, _ = self._modulation(t[:, None])
        attend = self._attend_to_clip(text, n, bidirectional=self.attention == "bidirectional")
        group = f if self.logits == "frame" else n * f
        found, queries = [], iter(self.queries)
        for depth, (tokens, *_) in enumerate(self._blocks(x, shared, rope, attend), start=1):
            if depth in self.taps:
                groups = self._all_tokens(tokens).unflatten(1, (-1, group)).flatten(0, 1)
                found.append(next(queries)(groups))  # [B * groups, dim]
        with torch.autocast(x.device.type, enabled=False):  # R1 and R2 compare the last digits
            logits: Tensor = self.logit(rms_norm(torch.cat(found, dim=-1).float()))
        return logits.view(b, -1)
