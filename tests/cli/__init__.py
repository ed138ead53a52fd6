"""Tests of aapt_deploy/cli."""
