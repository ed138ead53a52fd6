"""Define the causal family of Wan2.1: Self-Forcing, Causal-Forcing, LongLive, CausVid.

family.py      the family's choices: inputs, controls, prompts (NumPy only)
signature.py   names, shapes and state of the graphs (NumPy only)
rope.py        temporal RoPE angles and time features, on the host in float64 (NumPy only)
networks.py    the torch half of the family: build networks, cut them into graphs
generator.py   one pass: noisy latent frames in, clean ones out
vae.py         Wan2.1's VAE, latent frame by latent frame
taehv.py       TAEHV, a small VAE for the same latents
graphs.py      the networks as they are exported
keys.py        from the tensors of published files to ours
"""
