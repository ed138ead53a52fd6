"""Turn prompts into a text encoder's vectors: `aapt prompt`, and `aapt stream --encoder`.

The encoder is umT5, from a folder in Hugging Face's layout or from Wan2.1's own `.pth` file with
its tokenizer. Nothing is downloaded. Vectors are kept in a cache by a hash of text and encoder, so
the encoder is loaded only for prompts that it has not seen.

A prompt's vectors end with its end token; what follows is zero. Generators attend to the zeros too.
"""

import hashlib
import html
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aapt_deploy.backends.trial import Report
from aapt_deploy.bundle.files import refuse_irregular, whole, writing
from aapt_deploy.errors import CheckpointError, InputError, UsageError
from aapt_deploy.export.foreign import open_foreign

END = 1  # id of umT5's end token
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOKENIZER = "tokenizer.json"
LAYERS = (  # of a block: name in Wan2.1's file, name in transformers
    ("norm1", "layer.0.layer_norm"), ("norm2", "layer.1.layer_norm"),
    ("attn.q", "layer.0.SelfAttention.q"), ("attn.k", "layer.0.SelfAttention.k"),
    ("attn.v", "layer.0.SelfAttention.v"), ("attn.o", "layer.0.SelfAttention.o"),
    ("pos_embedding.embedding", "layer.0.SelfAttention.relative_attention_bias"),
    ("ffn.gate.0", "layer.1.DenseReluDense.wi_0"), ("ffn.fc1", "layer.1.DenseReluDense.wi_1"),
    ("ffn.fc2", "layer.1.DenseReluDense.wo"),
)  # fmt: skip
HINT = (
    "give the folder of google/umt5-xxl, or that of Wan2.1 with "
    "models_t5_umt5-xxl-enc-bf16.pth and google/umt5-xxl/tokenizer.json"
)


def encode(
    prompts: Sequence[str], folder: Path, tokens: int, precision: str, report: Report
) -> list[Path]:
    """Return files of float32 [tokens, dim], one for each prompt, from the cache if possible.

    Raises InputError if the folder has no encoder or no tokenizer, or a damaged one.
    Raises UsageError if the precision does not exist, or a prompt is empty.
    Raises OutputError if the cache cannot be written.
    """
    if precision not in PRECISIONS:
        wrong = f"precision {precision!r} does not exist for a text encoder"
        raise UsageError(wrong, f"precisions: {', '.join(PRECISIONS)}")
    texts = [cleaned(prompt) for prompt in prompts]
    if not all(texts):
        raise UsageError("a prompt is empty", "describe the video in words")
    weights, tokenizer = find(folder)
    mark = [fingerprint(weights), fingerprint([tokenizer]), tokens, precision]
    files = [cache_folder() / f"{_digest([text, *mark])}.npy" for text in texts]
    wanted = {file: text for file, text in zip(files, texts, strict=True) if not file.exists()}
    if wanted:
        report(f"loading the text encoder from {folder}")
        encoder = Encoder(weights, tokenizer, PRECISIONS[precision])
        for number, (file, text) in enumerate(wanted.items(), start=1):
            report(f"encoding prompt {number} of {len(wanted)}")
            with writing("the cache of prompts", "set XDG_CACHE_HOME to a folder with room"):
                file.parent.mkdir(parents=True, exist_ok=True)
                save(encoder.vectors(text, tokens), file)
    return files


def save(vectors: np.ndarray, path: Path) -> None:
    """Write vectors as .npy, whole or not at all. Raises OSError."""
    refuse_irregular(path)
    with whole(path) as temporary, temporary.open("wb") as file:
        np.save(file, vectors)


def copy(made: Sequence[Path], names: Sequence[Path]) -> None:
    """Copy files of the cache to `names`. Raises OutputError if one cannot be written."""
    for file, name in zip(made, names, strict=True):
        with writing(name, "name a file in a folder that can be written"):
            if len(names) > 1:
                name.parent.mkdir(parents=True, exist_ok=True)
            save(np.load(file), name)


def cleaned(prompt: str) -> str:
    """Resolve HTML entities and collapse white space, as Wan2.1 does before its tokenizer."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


def find(folder: Path) -> tuple[list[Path], Path]:
    """Return the files of weights in `folder`, and the tokenizer's. Raises InputError."""
    weights = sorted(folder.glob("*.safetensors")) if (folder / "config.json").is_file() else []
    weights = weights or sorted(folder.glob("*t5*.pth"))
    places = (folder, folder / "google" / "umt5-xxl", folder / "tokenizer")
    tokenizer = next((p / TOKENIZER for p in places if (p / TOKENIZER).is_file()), None)
    if not weights or tokenizer is None:
        lacks = "no weights of an encoder" if not weights else f"no {TOKENIZER}"
        raise InputError(f"folder {folder} has {lacks}", HINT)
    return weights, tokenizer


def fingerprint(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return what tells apart two versions of files without reading gigabytes."""
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "aapt_deploy" / "prompts"


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class Encoder:
    """umT5 with its tokenizer."""

    def __init__(self, weights: list[Path], tokenizer: Path, dtype: torch.dtype) -> None:
        """Raises InputError if a file is damaged or is not umT5's."""
        from tokenizers import Tokenizer

        try:
            self.tokenizer = Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # the library raises bare Exceptions
            damaged = f"tokenizer {tokenizer} cannot be read: {error}"
            raise InputError(damaged, HINT) from None
        published = weights[0].suffix == ".pth"
        self.model = _from_wan(weights[0], dtype) if published else _from_folder(weights[0], dtype)

    def ids(self, text: str, tokens: int) -> list[int]:
        """Return at most `tokens` ids; the last one is the end token."""
        ids = list(self.tokenizer.encode(text).ids)
        ids = ids if ids[-1:] == [END] else [*ids, END]
        return ids if len(ids) <= tokens else [*ids[: tokens - 1], END]

    def vectors(self, text: str, tokens: int) -> np.ndarray:
        """Return float32 [tokens, dim], zero beyond the prompt."""
        return self.embed(self.ids(text, tokens), tokens)

    def embed(self, ids: list[int], tokens: int) -> np.ndarray:
        with torch.inference_mode():
            found = self.model(input_ids=torch.tensor([ids])).last_hidden_state[0].float().numpy()
        padded = np.zeros((tokens, found.shape[1]), np.float32)
        padded[: len(ids)] = found
        return padded


def _from_folder(weights: Path, dtype: torch.dtype) -> Any:
    from transformers import UMT5EncoderModel

    try:
        found: Any = UMT5EncoderModel.from_pretrained(
            weights.parent, dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"encoder {weights.parent} cannot be loaded: {first}", HINT) from None
    found.eval()
    return found


def _from_wan(path: Path, dtype: torch.dtype) -> Any:
    """Load Wan2.1's own file into transformers' umT5. The sizes are read off the tensors."""
    from transformers import UMT5Config, UMT5EncoderModel

    there = open_foreign(path).tensors
    try:
        vocabulary, dim = there["token_embedding.weight"].shape
        buckets, heads = there["blocks.0.pos_embedding.embedding.weight"].shape
        width, hidden = (there[f"blocks.0.{x}.weight"].shape[0] for x in ("attn.q", "ffn.fc1"))
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"encoder {path} is not umT5's: it lacks {error}", HINT) from None
    depth = 1 + max(int(name.split(".")[1]) for name in there if name.startswith("blocks."))
    config = UMT5Config(
        vocab_size=vocabulary, d_model=dim, d_kv=width // heads, d_ff=hidden, num_layers=depth,
        num_heads=heads, relative_attention_num_buckets=buckets, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    names = {"token_embedding.weight": "shared.weight"}
    names["norm.weight"] = "encoder.final_layer_norm.weight"
    for block in range(depth):
        ends = ((theirs, f"encoder.block.{block}.{ours}.weight") for theirs, ours in LAYERS)
        names |= {f"blocks.{block}.{theirs}.weight": ours for theirs, ours in ends}
    if different := sorted(names.keys() ^ there.keys()):
        listed = ", ".join(different[:8])
        raise CheckpointError(f"encoder {path} is not umT5's: it differs in {listed}", HINT)
    weights = {ours: there[theirs].read().to(dtype) for theirs, ours in names.items()}
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    with torch.device("meta"):
        model: Any = UMT5EncoderModel(config)
    model.load_state_dict(weights, assign=True)
    model.eval()
    return model
