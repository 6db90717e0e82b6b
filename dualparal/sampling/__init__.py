"""Noise, prompts and samplers of the blocks of a video."""
