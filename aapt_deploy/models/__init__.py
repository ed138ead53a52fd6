"""The networks in PyTorch: generator, causal VAE, and the layers they share."""
