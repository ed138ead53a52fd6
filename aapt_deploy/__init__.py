"""Real-time deployment of block-causal video generators (AAPT): export, build, profile, stream."""

import os

# ONNX Runtime writes an id into the home directory and looks up Microsoft's hosts as soon as it is imported, unless this is set before. We promise
# that nothing leaves the machine unasked.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
