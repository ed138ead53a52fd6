"""The signature is what the networks really take and give: names, shapes, dtypes, state."""

import inspect
import math

import pytest
import torch
from torch import Tensor, nn

from aapt_deploy.bundle.signature import GraphSignature, TensorSpec, layer_names
from aapt_deploy.models.aapt import signature
from aapt_deploy.models.aapt.graphs import graph_modules
from aapt_deploy.models.aapt.signature import GRAPHS, signatures
from aapt_deploy.models.aapt.vae import to_pixels
from aapt_deploy.models.checkpoint import build
from aapt_deploy.models.inputs import random_inputs
from aapt_deploy.ops.block_causal_attention import NEXT, Ring
from aapt_deploy.profiles import Profile, Text, Vae, Window, load, preset_folder

TINY = load("tiny-cpu")
PRESETS = sorted(path.stem for path in preset_folder().glob("*.toml"))
PROFILES = {
    "tiny": TINY,
    "no-text": TINY.replace(text=Text("vocabulary", 0, 16)),
    "embedding": TINY.replace(text=Text("embedding", 6, 24)),
    "no-sink": TINY.replace(window=Window(2, 0)),
    "memoryless": TINY.replace(vae=Vae((), (8, 8, 8), 1, 1)),
    "long-memory": TINY.replace(vae=Vae((8, 8, 8, 8), (8, 8, 8, 4), 2, 3)),
}
CASES = [(name, graph) for name, profile in PROFILES.items() for graph in signatures(profile)]


def modules(profile: Profile) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return graph_modules(profile, *build(profile))


def feed(graph: GraphSignature, profile: Profile) -> list[Tensor]:
    specs = (*graph.inputs, *graph.state)
    shapes = [(spec.name, spec.shape, spec.dtype) for spec in specs]
    return random_inputs(shapes, 0, Ring.of(profile).tokens)


def leaving(graph: GraphSignature) -> list[TensorSpec]:
    """Return a module's outputs: the decoder's memory follows its frames, caches do not leave."""
    return [*graph.outputs, *(graph.state if graph.name == "decoder" else ())]


@pytest.mark.parametrize(("name", "graph"), CASES)
def test_a_module_takes_and_gives_what_its_signature_says(name: str, graph: str) -> None:
    profile = PROFILES[name]
    declared = signatures(profile)[graph]
    with torch.no_grad():
        given = modules(profile)[graph](*feed(declared, profile))
    given = given if isinstance(given, tuple) else (given,)
    wanted = [(spec.shape, f"torch.{spec.dtype}") for spec in leaving(declared)]
    assert [(tuple(t.shape), str(t.dtype)) for t in given] == wanted


@pytest.mark.parametrize(("name", "graph"), CASES)
def test_every_input_matters(name: str, graph: str) -> None:
    """A check of shapes would pass an unused tensor, or one under another's name."""
    profile = PROFILES[name]
    declared, module = signatures(profile)[graph], modules(profile)[graph]
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        values = feed(declared, profile)
        before = module(*values)
        for i, spec in enumerate((*declared.inputs, *declared.state)):
            other = list(values)
            if spec.name == "cache_len":
                other[i] = torch.tensor([0], dtype=torch.int32)
            elif spec.dtype in ("uint8", "int64"):
                other[i] = (values[i] + 1) % 4
            else:
                rng = torch.Generator().manual_seed(2)
                other[i] = values[i] + torch.randn(values[i].shape, generator=rng)
            after = module(*other)
            several = isinstance(before, tuple)
            pairs = zip(before, after, strict=True) if several else [(before, after)]
            assert any(not torch.equal(a, b) for a, b in pairs), f"{spec.name} changes nothing"


@pytest.mark.parametrize("name", PROFILES)
def test_a_module_calls_its_inputs_by_their_names(name: str) -> None:
    for graph, declared in signatures(PROFILES[name]).items():
        taken = inspect.signature(modules(PROFILES[name])[graph].forward).parameters.values()
        names = [p.name for p in taken if p.kind != p.VAR_POSITIONAL]
        assert names == [spec.name for spec in declared.inputs]
        assert any(p.kind == p.VAR_POSITIONAL for p in taken) == bool(declared.state)


def test_what_leaves_carries_the_right_name() -> None:
    """Keys and values, or old and new memory, have one shape. Only their contents differ."""
    torch.manual_seed(0)
    networks, declared = build(TINY), signatures(TINY)
    generator, vae = networks
    with torch.no_grad():
        given = {name: feed(graph, TINY) for name, graph in declared.items()}
        left = {}
        for name, module in graph_modules(TINY, *networks).items():
            if name != "encoder":
                names = [spec.name for spec in leaving(declared[name])]
                left[name] = dict(zip(names, module(*given[name]), strict=True))
        read = (*declared["generator"].inputs, *declared["generator"].state)
        inputs = {spec.name: value for spec, value in zip(read, given["generator"], strict=True)}
        prefixes = ("k_cache", "v_cache")
        caches = [[inputs[name] for name in layer_names(prefix, TINY)] for prefix in prefixes]
        own = [inputs[name] for name in ("noisy", "previous", "condition", "time", "rope_time")]
        clean, *blocks = generator.step(*own, *caches, inputs["cache_len"])
        assert torch.equal(left["generator"]["clean"], clean)
        texts = generator.prompt(given["prompt"][0])
        for prefix, block, text in zip("kv", blocks, texts, strict=True):
            for layer in range(TINY.model.depth):
                assert torch.equal(left["generator"][f"{prefix}_block.{layer:02d}"], block[layer])
                assert torch.equal(left["prompt"][f"text_{prefix}.{layer:02d}"], text[layer])
        frames, memory = vae.decode_step(given["decoder"][0], given["decoder"][1:])
        assert torch.equal(left["decoder"]["frames"], to_pixels(frames[0]))
        for i, kept in enumerate(memory):
            assert torch.equal(left["decoder"][f"memory.{i:02d}"], kept)
        assert not torch.equal(memory[0], given["decoder"][1])


@pytest.mark.parametrize("name", PROFILES)
def test_the_modules_are_those_of_the_signature(name: str) -> None:
    profile = PROFILES[name]
    assert list(modules(profile)) == list(signatures(profile))
    assert ("prompt" in signatures(profile)) == bool(profile.text.tokens)
    assert set(signatures(profile)) <= set(GRAPHS)
    assert not any(module.training for module in modules(profile).values())


@pytest.mark.parametrize("name", PRESETS)
def test_names_are_unique_and_sizes_follow_the_profile(name: str) -> None:
    profile = load(name)
    for graph in signatures(profile).values():
        names = [spec.name for spec in (*graph.inputs, *graph.outputs, *graph.state)]
        assert len(set(names)) == len(names)
        assert not any(spec.name.endswith(NEXT) for spec in graph.state)
        assert all(min(spec.shape) > 0 for spec in (*graph.inputs, *graph.outputs, *graph.state))
    caches = signatures(profile)["generator"].state
    assert len(caches) == 2 * profile.model.depth
    model = profile.model
    shape = (1, profile.cache_tokens, model.heads, profile.head_dim)
    assert {spec.shape for spec in caches} == {shape}
    assert profile.cache_tokens == Ring.of(profile).tokens
    numbers = sum(math.prod(spec.shape) for spec in caches)
    assert numbers == 2 * model.depth * profile.cache_tokens * model.dim


def test_the_order_of_layers_is_the_order_of_names() -> None:
    deep = load("aapt-8b-736x416-h100")
    names = layer_names("k_cache", deep)
    assert names[0] == "k_cache.00"
    assert names == sorted(names)
    assert len(set(names)) == 36
    caches = [spec.name for spec in signature.generator(TINY).state]
    assert caches == ["k_cache.00", "k_cache.01", "v_cache.00", "v_cache.01"]
    text = [spec.name for spec in signature.prompt(TINY).outputs]
    assert text == ["text_k.00", "text_k.01", "text_v.00", "text_v.01"]


def test_an_engine_may_ask_for_a_longer_cache() -> None:
    longer = signature.generator(TINY, cache_tokens=Ring.of(TINY, in_place=True).tokens)
    assert longer.spec("k_cache.01").shape[1] == TINY.cache_tokens + TINY.frame_tokens
    assert longer.spec("k_block.01").shape[1] == TINY.frame_tokens


def test_bytes_of_a_tensor() -> None:
    assert TensorSpec("x", (2, 3), "uint8").bytes == 6
    assert TensorSpec("x", (2, 3)).bytes == 24
    assert TensorSpec("x", (2, 3), "int64").bytes == 48
    frames = signature.decoder(TINY).spec("frames")
    assert frames.bytes == 4 * 64 * 32 * 3


def test_a_misfit_names_the_first_tensor_that_differs() -> None:
    decoder = signatures(TINY)["decoder"]
    takes = {spec.name: (spec.dtype, spec.shape) for spec in (*decoder.inputs, *decoder.state)}
    gives = {spec.name: (spec.dtype, spec.shape) for spec in decoder.outputs}
    gives |= {spec.name + NEXT: (spec.dtype, spec.shape) for spec in decoder.state}
    assert decoder.misfit(takes, gives, state_leaves=True) == ""
    first = decoder.state[0]
    found = decoder.misfit(takes, gives, state_leaves=False)
    assert found.startswith(f"output '{first.name}{NEXT}' is float32 [")
    found = decoder.misfit(takes | {"z": ("int8", ["n", 2])}, gives, True)
    assert found == "input 'z' is int8 ['n', 2], by the profile none"
    wrong = {**gives, "frames": ("float32", gives["frames"][1])}
    size = list(gives["frames"][1])
    found = decoder.misfit(takes, wrong, True)
    assert found == f"output 'frames' is float32 {size}, by the profile uint8 {size}"
    del takes["latent"]
    found = decoder.misfit(takes, gives, True)
    assert found.startswith("input 'latent' is missing, by the profile float32 [1, ")
