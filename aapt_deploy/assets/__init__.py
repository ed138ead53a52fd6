"""The embedded checkpoint: what `aapt demo` runs when nobody brings one."""

from pathlib import Path

FOLDER = Path(__file__).parent
CHECKPOINT = FOLDER / "demo.safetensors"
SHA256_FILE = FOLDER / "demo.sha256"


def checkpoint_sha256() -> str:
    """The hash that the embedded checkpoint must have."""
    return SHA256_FILE.read_text(encoding="ascii").strip()


def demo_controls() -> Path:
    """The flight that `aapt demo` takes."""
    return FOLDER / "demo-flight.jsonl"
