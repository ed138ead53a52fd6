"""Real-time deployment of block-causal video generators (AAPT): export, build, profile, stream."""

__version__ = "0.1.0"
