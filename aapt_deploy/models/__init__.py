"""Networks, one folder per family, and the modules that families share.

checkpoint.py       read and write checkpoints
family.py           the interface of a family of checkpoints, and the table of families
sampler.py          from noise to a clean latent, pass by pass
prompt_graph.py     the prompt graph of every family
rotary.py           rotate queries and keys by RoPE's angles
vectors.py          prompts that a text encoder has turned into vectors
signature.py        parts of a graph's signature that families share
sources.py          how a tensor of ours is made from those of a published file
published.py        published files, their presets, and what is refused
inputs.py           random inputs of realistic scale, for tracing and parity
fp8.py              linear layers in FP8, as they are exported
cost.py             memory and the least time of each stage, by arithmetic
random_weights.py   a checkpoint of random weights, of any shape
aapt/               the AAPT family
wan/                the causal family of Wan2.1: Self-Forcing, Causal-Forcing, LongLive, CausVid
"""
