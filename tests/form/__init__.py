"""Tests of the code's own form, and of documents."""
