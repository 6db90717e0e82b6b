"""Whole files: video segments, pictures, latents. What is in them is decided elsewhere."""
