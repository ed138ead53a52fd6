"""Text that a person reads, kept as files under tests/golden.

RENEW_GOLDEN=1 in the environment writes the files anew. Read the difference before you keep it.
"""

import os
from pathlib import Path

from tests.support import ROOT

FOLDER = ROOT / "tests" / "golden"
RENEW = "RENEW_GOLDEN"


def check(name: str, text: str, folder: Path = FOLDER) -> None:
    """Fail if `text` is not that of the file `name`, or write it if that is asked for."""
    file = folder / name
    text = "".join(f"{line.rstrip()}\n" for line in text.splitlines())  # a table pads its lines
    if os.environ.get(RENEW) == "1":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert file.is_file(), f"{file} is missing: run this test with {RENEW}=1"
    wanted = file.read_text(encoding="utf-8")
    assert text == wanted, f"{file.name} is not what is printed; {RENEW}=1 renews it"
