"""Tests of aapt_deploy/rollout."""
