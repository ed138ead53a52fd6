"""Tests of aapt_deploy/ops/block_causal_attention."""
