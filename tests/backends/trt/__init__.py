"""Tests of aapt_deploy/backends/trt."""
