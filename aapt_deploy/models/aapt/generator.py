"""Generate one latent frame per pass (Seaweed-APT2, section 2.1 and App. A).

The generator is a text + visual MMDiT. Its input is the channel concat of the noisy latent, the
previous latent frame (recycled) and the camera condition. The same weights run in two ways, equal
to 1e-5 in fp32:

    forward   many blocks at once under a block-causal mask, for training
    step      one block against the KV cache, for inference; this one is exported

The pass returns the clean latent. Its velocity is (noisy - clean) / t, so at t = 1 the pass is
APT's G(z) = z - v(z, 1). `posterior` computes what the previous frame and the noisy latent already
determine. The network predicts the rest, which is zero for a still picture.

Letters: B batch, n blocks, C latent channels, h x w latent pixels, F tokens per frame,
L text tokens, H heads, D head_dim.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aapt_deploy.models.aapt.backbone import AttendLayer, Backbone
from aapt_deploy.models.aapt.layers import Stream, join_rope, posterior, rms_norm
from aapt_deploy.ops.block_causal_attention.torch_op import block_causal_attention
from aapt_deploy.profiles import CONDITION_CHANNELS, Profile


class Generator(Backbone):
    STEP = "visual"  # the stack of blocks that a pass runs

    def __init__(self, profile: Profile) -> None:
        super().__init__(profile)
        m, channels = profile.model, profile.video.latent_channels
        inputs, size = 2 * channels + CONDITION_CHANNELS, m.patch + 2 * m.halo
        self.time_out = nn.Linear(m.dim, 2 * m.dim)
        # With a halo, patches overlap and blend.
        self.visual_out = nn.ConvTranspose2d(m.dim, channels, size, m.patch, m.halo)
        # A linear predictor, so that the blocks need not learn what it can do.
        self.skip = nn.Conv2d(inputs, channels * m.patch**2, size, m.patch, m.halo, bias=False)
        for head in (self.time_out, self.visual_out, self.skip):  # at first, a still picture
            for parameter in head.parameters():
                nn.init.zeros_(parameter)

    @property
    def step_blocks(self) -> Sequence[Stream]:
        """The blocks that run in every pass. Those of the prompt run once per prompt."""
        return self.visual

    def prompt_parameters(self) -> set[str]:
        """Return the names of the parameters that only the prompt graph reads."""
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if name.startswith(("text", "vocabulary"))}

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Turn x [N, channels, h, w] into tokens [N, F, dim] and a linear guess [N, C, h, w]."""
        tokens = self.visual_in(x).flatten(2).transpose(1, 2)
        return tokens, F.pixel_shuffle(self.skip(x), self.profile.model.patch)

    def latent(self, tokens: Tensor) -> Tensor:
        """Turn tokens [N, F, dim] into a latent [N, C, h, w]."""
        rows = self.profile.latent_height // self.profile.model.patch
        latent: Tensor = self.visual_out(tokens.transpose(1, 2).unflatten(2, (rows, -1)))
        return latent

    def times(self, t: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Turn t [...] into the shared modulation, six of [..., dim], and the head's two."""
        shared, features = self._modulation(t)
        return shared, list(self.time_out(features).chunk(2, dim=-1))

    def forward(
        self, noisy: Tensor, previous: Tensor, condition: Tensor, t: Tensor,
        text: Tensor, rope_time: Tensor,
    ) -> Tensor:  # fmt: skip
        """Return the clean latents [B, n, C, h, w] of n blocks, each with the view of `step`.

        noisy, previous [B, n, C, h, w]; condition [B, n, 6, h, w]; t [B, n] in (0, 1]; text as in
        `prompt`; rope_time [B, n, 2, P_time] of the blocks' absolute indices
        (`rope.temporal_rope`). The first block is the sink of the others.
        """
        b, n = noisy.shape[:2]
        f = self.profile.frame_tokens
        rope = join_rope(rope_time, self.spatial_rope)  # [B, n, 2, F, P]
        rope = rope.transpose(1, 2).flatten(2, 3)  # [B, 2, n*F, P]
        times = t[..., None, None, None]
        innovation, base, spread = posterior(noisy, previous, times, self.step_spread)
        x = torch.cat([innovation, previous, condition], dim=2)
        x, direct = self.embed(x.flatten(0, 1))  # [B*n, F, dim], [B*n, C, h, w]
        x = x.unflatten(0, (b, n)).flatten(1, 2)  # [B, n*F, dim]
        x, _ = self._run(x, t.repeat_interleave(f, dim=1), rope, self._attend_to_clip(text, n))
        latent = self.latent(x.unflatten(1, (n, f)).flatten(0, 1)) + direct  # [B*n, C, h, w]
        clean: Tensor = base + spread * latent.unflatten(0, (b, n))
        return clean

    def step(
        self, noisy: Tensor, previous: Tensor, condition: Tensor, t: Tensor, rope_time: Tensor,
        k_cache: list[Tensor], v_cache: list[Tensor], cache_len: Tensor,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
        """Return the clean latent of one block, and the keys and values to commit to its slot.

        noisy, previous [1, C, h, w]; condition [1, 6, h, w]; t [1]; rope_time [1, 2, P_time];
        per-layer caches [1, S, H, D], read only; cache_len int32 [1], valid cache tokens. Returns
        clean [1, C, h, w] and per-layer k, v [1, F, H, D]. Training runs B streams in lockstep:
        every 1 becomes B, except that of cache_len.
        """
        rope = join_rope(rope_time, self.spatial_rope)  # [1, 2, F, P]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            return block_causal_attention(q, k, v, k_cache[layer], v_cache[layer], cache_len)

        times = t[:, None, None, None]
        innovation, base, spread = posterior(noisy, previous, times, self.step_spread)
        x = torch.cat([innovation, previous, condition], dim=1)
        x, direct = self.embed(x)  # [1, F, dim], [1, C, h, w]
        x, kept = self._run(x, t[:, None], rope, attend)
        return base + spread * (self.latent(x) + direct), [k for k, _ in kept], [v for _, v in kept]

    def _run(
        self, x: Tensor, t: Tensor, rope: Tensor, attend: AttendLayer
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Run the blocks and the head's norm on tokens [B, N, dim], with t [B, N or 1].

        Returns tokens [B, N, dim], and what else each block's attention returned.
        """
        shared, features = self._modulation(t)
        kept = []
        for tokens, *rest in self._blocks(x, shared, rope, attend):
            x = tokens
            kept.append(tuple(rest))
        shift, scale = self.time_out(features).chunk(2, dim=-1)
        x = self._all_tokens(x)
        return rms_norm(x) * (1 + scale) + shift, kept
