"""Real-time deployment of block-causal video generators (AAPT): export, build, profile, stream."""

import os

# On import ONNX Runtime writes an id into the home directory and looks up Microsoft's hosts, unless
# this is set. Nothing may leave the machine unasked.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
