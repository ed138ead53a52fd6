"""Checkpoints from nothing: data, losses, the loop, and how long a world holds.

run.py         a whole run: VAE, latents, stages, and a checkpoint after each
stages.py      the stages of the generator
latents.py     all clips as latents, cached
loop.py        updates, averages, saving and resuming
recipe.py      every number of the recipe
processes.py   one process or many
draws.py       random numbers that a resumed run draws again
scalars.py     loss curves for TensorBoard
samples.py     pictures and clips of a checkpoint in training
losses/        what is learnt, one file per objective
world/         the toy world: renderer and clips
judge/         how long a generated world stays true
"""
