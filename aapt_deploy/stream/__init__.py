"""Live: frames out, controls in.

stream.py     pace a rollout, write its frames, end it cleanly
controls.py   flights from a file, live steering from stdin
"""
