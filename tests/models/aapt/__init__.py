"""Tests of aapt_deploy/models/aapt."""
