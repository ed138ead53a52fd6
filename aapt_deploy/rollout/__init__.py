"""Generate a video block by block with any engine.

loop.py     steering in, frames out, one block at a time
engine.py   the Protocols that every engine implements
starts.py   where a rollout starts: an image, a latent, a prompt
"""
