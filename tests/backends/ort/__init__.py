"""Tests of aapt_deploy/backends/ort."""
