"""Costs of a video, in seconds and bytes, and the best cut of its model. Torch is used to measure only."""
