"""The AAPT generator: a text + visual MMDiT that makes one latent frame per pass (Seaweed-APT2, section 2.1 and App. A).

The input is the channel concat of the noisy latent, the previous latent frame (recycled) and the camera condition.

Two ways to run the same weights, equal to 1e-5 in fp32:
    forward   many blocks at once under a block-causal mask, for training
    step      one block against the KV cache, for inference; this is what gets exported

The pass returns the clean latent; its velocity is (noisy - clean) / t, so at t = 1 the pass is APT's G(z) = z - v(z, 1). What the network itself
predicts is the rest that a still picture leaves over: `posterior` says what is known from the previous frame and the noisy latent alone.

Letters: B batch, n blocks, C latent channels, h x w latent pixels, F tokens per frame, L text tokens, H heads, D head_dim.
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
        m, patch = profile.model, profile.model.patch**2
        channels, size = profile.video.latent_channels, m.patch + 2 * m.halo
        self.time_out = nn.Linear(m.dim, 2 * m.dim)
        self.visual_out = nn.ConvTranspose2d(m.dim, channels, size, stride=m.patch, padding=m.halo)  # with a halo, patches overlap and blend
        # What a linear predictor can do need not be learned by the blocks.
        self.skip = nn.Conv2d(2 * channels + CONDITION_CHANNELS, channels * patch, size, stride=m.patch, padding=m.halo, bias=False)
        for head in (self.time_out, self.visual_out, self.skip):  # a fresh generator is a still picture
            for parameter in head.parameters():
                nn.init.zeros_(parameter)

    @property
    def step_blocks(self) -> Sequence[Stream]:
        """The blocks that a pass runs; those of the prompt are run once per prompt."""
        return self.visual

    def prompt_parameters(self) -> set[str]:
        """Names of the parameters that only the prompt graph reads."""
        return {name for name, _ in self.named_parameters() if name.startswith(("text", "vocabulary"))}

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input [N, channels, h, w] -> tokens [N, F, dim] and the linear predictor's latent [N, C, h, w]."""
        tokens = self.visual_in(x).flatten(2).transpose(1, 2)
        return tokens, F.pixel_shuffle(self.skip(x), self.profile.model.patch)

    def latent(self, tokens: Tensor) -> Tensor:
        """Tokens [N, F, dim] -> latent [N, C, h, w]."""
        rows = self.profile.latent_height // self.profile.model.patch
        latent: Tensor = self.visual_out(tokens.transpose(1, 2).unflatten(2, (rows, -1)))
        return latent

    def times(self, t: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """t [...] -> the shared modulation, six of [..., dim], and the head's shift and scale [..., dim]."""
        shared, features = self._modulation(t)
        return shared, list(self.time_out(features).chunk(2, dim=-1))

    def forward(self, noisy: Tensor, previous: Tensor, condition: Tensor, t: Tensor, text: Tensor, rope_time: Tensor) -> Tensor:
        """The clean latents of n blocks, each of which sees what `step` would.

        noisy, previous [B, n, C, h, w]; condition [B, n, 6, h, w]; t [B, n] in (0, 1]; text as in `prompt`; rope_time [B, n, 2, P_time] of
        the blocks' absolute indices (`rope.temporal_rope`). The first block is the sink of the others. Returns [B, n, C, h, w].
        """
        b, n = noisy.shape[:2]
        f = self.profile.frame_tokens
        rope = join_rope(rope_time, self.spatial_rope).transpose(1, 2).flatten(2, 3)  # [B, 2, n*F, P]
        innovation, base, spread = posterior(noisy, previous, t[..., None, None, None], self.step_spread)
        x, direct = self.embed(torch.cat([innovation, previous, condition], dim=2).flatten(0, 1))  # [B*n, F, dim], [B*n, C, h, w]
        x = x.unflatten(0, (b, n)).flatten(1, 2)  # [B, n*F, dim]
        x, _ = self._run(x, t.repeat_interleave(f, dim=1), rope, self._attend_to_clip(text, n))
        latent = self.latent(x.unflatten(1, (n, f)).flatten(0, 1)) + direct  # [B*n, C, h, w]
        clean: Tensor = base + spread * latent.unflatten(0, (b, n))
        return clean

    def step(self, noisy: Tensor, previous: Tensor, condition: Tensor, t: Tensor, rope_time: Tensor, k_cache: list[Tensor],
             v_cache: list[Tensor], cache_len: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
        """The clean latent of one block, and the keys and values to commit to its slot.

        noisy, previous [1, C, h, w]; condition [1, 6, h, w]; t [1]; rope_time [1, 2, P_time]; per-layer caches [1, S, H, D], read only;
        cache_len int32 [1], valid cache tokens. Returns clean [1, C, h, w] and per-layer k, v [1, F, H, D]. Training runs B streams in lockstep
        through it: B in the place of every 1 but that of cache_len.
        """
        rope = join_rope(rope_time, self.spatial_rope)  # [1, 2, F, P]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            return block_causal_attention(q, k, v, k_cache[layer], v_cache[layer], cache_len)

        innovation, base, spread = posterior(noisy, previous, t[:, None, None, None], self.step_spread)
        x, direct = self.embed(torch.cat([innovation, previous, condition], dim=1))  # [1, F, dim], [1, C, h, w]
        x, kept = self._run(x, t[:, None], rope, attend)
        return base + spread * (self.latent(x) + direct), [k for k, _ in kept], [v for _, v in kept]

    def _run(self, x: Tensor, t: Tensor, rope: Tensor, attend: AttendLayer) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """The blocks and the head's norm: tokens [B, N, dim] -> tokens [B, N, dim], and what each block's attention wants kept. t [B, N or 1]."""
        shared, features = self._modulation(t)
        kept = []
        for tokens, *rest in self._blocks(x, shared, rope, attend):
            x = tokens
            kept.append(tuple(rest))
        shift, scale = self.time_out(features).chunk(2, dim=-1)
        x = self._all_tokens(x)
        return rms_norm(x) * (1 + scale) + shift, kept
