"""FlashDreams 0.1.0 on the benchmark's weights and inputs: a process of its own, for bench/wan.py.

    python bench/wan_rival.py FOLDER DTYPE RUNS

On a CPU two of its functions need a stand-in: a cuDNN operator becomes PyTorch's attention, and its
Triton rotation the same arithmetic. So its own kernels are not measured here.
"""

import json
import sys
import time
from pathlib import Path

import torch
from flashdreams.core.attention import cp, rope
from flashdreams.recipes.wan.transformer.impl.network import WanDiTNetworkConfig
from flashdreams.recipes.wan.transformer.wan21 import Wan21TransformerConfig
from safetensors.torch import load_file, save_file
from torch import Tensor


def attention(
    query: Tensor, key: Tensor, value: Tensor, return_lse: bool = False
) -> tuple[Tensor, None]:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value), None


def rotation(x: Tensor, freqs: Tensor, interleaved: bool = False, inplace: bool = True) -> Tensor:
    angle = freqs[None, :, 0, :, ::2].float()  # [1, S, 1, P]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., 0::2].clone(), x[..., 1::2].clone()
    x[..., 0::2], x[..., 1::2] = a * cos - b * sin, b * cos + a * sin
    return x


def main() -> None:
    folder, dtype, runs = Path(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(int(sys.argv[4]))
    cp.torch_sdpa_cudnn, rope.apply_rotary_pos_emb = attention, rotation
    shape = json.loads((folder / "shape.json").read_text())
    given = load_file(folder / "inputs.safetensors")
    network = WanDiTNetworkConfig(num_layers=shape["depth"])
    transformer = Wan21TransformerConfig(
        network=network, dtype=dtype, checkpoint_path=str(folder / "weights.safetensors"),
        len_t=shape["block_frames"], window_size_t=shape["window"], sink_size_t=0,
        compile_network=False, use_cuda_graph=False,
    ).setup()  # fmt: skip
    with torch.no_grad():
        cache = transformer.initialize_autoregressive_cache(
            height=shape["height"], width=shape["width"], text_embeddings=given["text"].to(dtype)
        )
        times = []
        for block, noisy in enumerate(given["noisy"]):
            cache.start(block)
            x = transformer.patchify_and_maybe_split_cp(noisy[None].to(dtype))
            last = block == len(given["noisy"]) - 1
            for _ in range(1 + runs if last else 1):
                start = time.perf_counter()
                flow = transformer.predict_flow(x, torch.tensor([shape["t"]]), cache)
                times.append(time.perf_counter() - start)
            cache.finalize(block)
        flow = transformer.unpatchify_and_maybe_gather_cp(flow)[0].float()
    save_file({"flow": flow.contiguous()}, folder / f"rival-{sys.argv[2]}.safetensors")
    print(json.dumps({"times_s": [round(t, 3) for t in times[-runs:]]}))


if __name__ == "__main__":
    main()
