"""Tests of aapt_deploy/export."""
