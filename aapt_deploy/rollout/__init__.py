"""The autoregressive loop, what it asks of an engine, and where it starts.

loop.py     steering in, frames out, one block at a time
engine.py   Protocols: what every engine can do
starts.py   where a rollout starts: an image, a latent, a prompt
"""
