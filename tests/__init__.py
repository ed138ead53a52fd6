"""Tests. The folder is a package, so that `tests.support` is this one and no other's."""
