"""Locate the embedded checkpoint, its hash, and the flight of `aapt demo`."""

from pathlib import Path

FOLDER = Path(__file__).parent
CHECKPOINT = FOLDER / "demo.safetensors"
SHA256_FILE = FOLDER / "demo.sha256"


def checkpoint_sha256() -> str:
    """Return the hash that the embedded checkpoint must have."""
    return SHA256_FILE.read_text(encoding="ascii").strip()


def demo_controls() -> Path:
    """Return the path of the demo's controls."""
    return FOLDER / "demo-flight.jsonl"
