"""Tests of aapt_deploy/video."""
