"""Networks: one folder per family, and what families share.

checkpoint.py       read and write checkpoints
family.py           what a family of checkpoints chooses, and nothing else
fp8.py              linear layers in FP8, as they are exported
cost.py             memory and the least time of each stage, by arithmetic
random_weights.py   a checkpoint of random weights, of any shape
aapt/               the AAPT family
"""
