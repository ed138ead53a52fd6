"""Tests of aapt_deploy/measure."""
