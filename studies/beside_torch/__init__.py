"""Speed of the VAE and of Inception beside PyTorch's, in turns on one machine (extra [parity])."""
