"""BlockCausalAttention: a block's queries against a flat cache of past K and V.

    BlockCausalAttention(q, k, v, k_cache, v_cache, cache_len) -> (out, k_block, v_block)

    q, k, v           [1, T, H, D]  the block's tokens, after QK-norm and RoPE: position is already
                                    inside K, so order no longer matters
    k_cache, v_cache  [1, S, H, D]  token_major, read-only; only the first `cache_len` tokens are
                                    ever read, the rest may hold anything
    cache_len         int32 [1]     valid tokens of the cache, 0..S
    out               [1, T, H, D]  softmax(q . [k_cache[:cache_len], k]^T / sqrt(D))
                                    . [v_cache[:cache_len], v]
    k_block, v_block  [1, T, H, D]  k, v in the cache's own dtype and layout, ready to be committed
                                    (the CUDA kernel has a cache layout of its own, hopper_fp8:
                                    see plugins/block_causal_attention)
    attributes        scale = 1 / sqrt(D), plugin_namespace = "aapt", plugin_version = "1"

There is no mask. A block attends to every valid token and to itself, so block causality depends on
what is in the cache. One layer's cache:

                 |<- text ->|<- sink ->|<------ ring of N past blocks ------>|
      tokens     |  prompt  |  block 0 |    0    |    1    |  ...  |  N - 1  |
      written    |  by host |   once   |       the newest over the oldest    |

Block i >= 1 is kept at place (i - 1) % N. Without a sink the ring starts right after the text, and
block i is kept at place i % N. While the cache fills, its valid tokens are a prefix; once full, all
of it is valid. Block i therefore sees the text, the sink, the N blocks before it, and itself.

Two forms of the same ring, with equal attention sets:

    alias-free   The op's own form. The block leaves as k_block, v_block and the runtime copies it
                 to `slot` after the step. A pass that must not be kept is not copied.
    in place     For engines that update a cache inside the graph: the graph writes the block to
                 `slot`, then attends to the first `valid` tokens, the block included. The ring has
                 one place more (N + 1), so the block that is overwritten has just left the window,
                 and every further pass over the same block overwrites only that block's own place.
                 The last pass stays.

Facets, all with the argument order above:

    here               the contract and the slot arithmetic; standard library only, for every engine
    reference.py       numpy, float64: the truth the others are measured against
    torch_op.py        torch.ops.aapt.block_causal_attention, and the node in an exported graph
    onnx_function.py   the node's meaning in standard ONNX operators
    triton_op.py       the torch op on a GPU, token-major; cuda_op.py the same with FP8 caches
    kernels.py         the CUDA kernels of plugins/block_causal_attention: compile, cache, launch

The TensorRT plugins around these kernels have TensorRT's shape, not the op's. They are in
backends/trt/plugin/.
"""

from dataclasses import dataclass, replace

from aapt_deploy.profiles import Profile

OPSET = 24  # of exported graphs: the first with TensorScatter
DOMAIN = "aapt"  # of the ONNX node and of the torch op
NAME = "BlockCausalAttention"  # ONNX op type and TensorRT plugin name
VERSION = 1  # of the ONNX domain
TORCH_NAME = "aapt::block_causal_attention"
PLUGIN_NAMESPACE = "aapt"
PLUGIN_VERSION = "1"

# Tensor names that the in-place form puts in the place of `cache_len` and of the block outputs.
SLOT = "slot"  # int64 [1]
VALID = "valid"  # int64 [1]
NEXT = ".next"  # cache input `x` comes out as `x.next`; a runtime binds one buffer to both


def softmax_scale(head_dim: int) -> float:
    """Factor on q . k before the softmax."""
    return float(head_dim**-0.5)


@dataclass(frozen=True)
class Place:
    """Where one block lives in the cache, and how much it may read. All counts are tokens."""

    slot: int  # offset of the block's first token in the cache
    cache_len: int  # cached tokens that the block attends to, without it; alias-free reads these
    valid: int  # the same with the block itself; in place reads these, once the block is written


@dataclass(frozen=True)
class Ring:
    """Layout of one layer's cache, `[ text | sink | ring ]`, and the only slot arithmetic.

    Exact for any block index.
    """

    text_tokens: int  # prompt tokens in front, written by the host
    block_tokens: int  # tokens of one block
    sink_blocks: int  # first blocks that are never overwritten
    window_blocks: int  # past blocks in sight (N)
    in_place: bool = False  # the graph writes the block itself: the ring has N + 1 places

    def __post_init__(self) -> None:
        assert self.text_tokens >= 0 and self.sink_blocks >= 0, f"{self} has a negative length"
        assert self.block_tokens > 0 < self.window_blocks, f"{self} has an empty block or window"

    @classmethod
    def of(cls, profile: Profile, in_place: bool = False) -> "Ring":
        """The ring that `profile` asks for."""
        text, window = profile.cached_text_tokens, profile.window
        block = profile.video.block_frames
        sink, past = window.sink_frames // block, window.frames // block
        return cls(text, profile.block_tokens, sink, past, in_place)

    def with_in_place(self, in_place: bool) -> "Ring":
        """The same ring in the other form (or in this one)."""
        return replace(self, in_place=in_place)

    @property
    def ring_blocks(self) -> int:
        """Blocks that physically fit into the ring."""
        return self.window_blocks + self.in_place

    @property
    def tokens(self) -> int:
        """Length S of the cache."""
        return self.text_tokens + (self.sink_blocks + self.ring_blocks) * self.block_tokens

    def place(self, block: int) -> Place:
        """Slot and lengths for `block`, counted from 0 at the start of the stream."""
        assert block >= 0, f"{block=} is before the start of the stream"
        past_ring = block - self.sink_blocks  # negative: the block belongs to the sink
        frame = block if past_ring < 0 else self.sink_blocks + past_ring % self.ring_blocks
        cached = min(block, self.sink_blocks + self.window_blocks)
        cache_len = self.text_tokens + cached * self.block_tokens
        slot = self.text_tokens + frame * self.block_tokens
        return Place(slot, cache_len, cache_len + self.block_tokens)

    def visible(self, block: int) -> list[int]:
        """Return the blocks that `block` attends to, ascending, itself included."""
        assert block >= 0, f"{block=} is before the start of the stream"
        sink = range(min(self.sink_blocks, block + 1))
        window = range(max(self.sink_blocks, block - self.window_blocks), block + 1)
        return [*sink, *window]
