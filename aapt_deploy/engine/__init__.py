"""Backends: what opens and builds the graphs of a bundle. table.py lists them, one row each."""
