"""Tests of aapt_deploy/ops."""
