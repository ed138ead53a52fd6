"""Tests of aapt_deploy/stream."""
