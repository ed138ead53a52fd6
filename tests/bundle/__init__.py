"""Tests of aapt_deploy/bundle."""
