"""Training: the world to learn, its data, and the stages that turn it into a checkpoint. Not imported by any command but `aapt train`."""
