"""The real TensorRT Python bindings of two releases, loaded over link stubs, and strict fakes."""

from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"  # call logs; `--write-golden` of inside.py renews them
