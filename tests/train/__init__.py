"""Tests of aapt_deploy/train."""
