"""Stable Diffusion: text encoder, denoiser, autoencoder, samplers."""
