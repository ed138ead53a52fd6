"""Define the AAPT family: an MMDiT with a text and a visual stream, and a causal VAE.

family.py          the family's choices: inputs, sampler, controls, prompts (NumPy only)
networks.py        the torch half of the family: build networks, cut them into graphs
signature.py       names, shapes and state of the graphs (NumPy only)
camera.py          velocities in, rays out (NumPy only)
prompts.py         words in, token ids out (NumPy only)
rope.py            temporal RoPE angles, on the host in float64 (NumPy only)
layers.py          layers that networks share
backbone.py        the transformer of generator and discriminator
generator.py       one pass: noisy latent in, clean latent out
discriminator.py   judges latents in adversarial training
vae.py             encoder and decoder between pixels and latents
graphs.py          the networks as they are exported
context.py         tokens and heads of one batch shared by several processes
"""
