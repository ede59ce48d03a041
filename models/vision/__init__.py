"""Models that read images: a vision transformer and a small convolutional network."""
