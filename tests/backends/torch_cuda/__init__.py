"""Tests of aapt_deploy/backends/torch_cuda."""
