"""What several test files share. A test file imports from here and never from another test file."""

from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the repository
