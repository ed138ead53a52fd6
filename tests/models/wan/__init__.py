"""Tests of aapt_deploy/models/wan."""
