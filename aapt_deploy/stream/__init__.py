"""Live: frames out, controls in.

stream.py     write a session's frames to a sink
session.py    one person's stream: rollout, pacing, newest controls; what signals do to it
controls.py   flights from a file, live steering from stdin
"""
