"""The toy world that the demo is trained on.

worlds.py   terrain, weather and cameras, rendered
data.py     clips: rendered or read, and stored
"""
