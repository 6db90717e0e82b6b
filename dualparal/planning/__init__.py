"""What a video costs, in seconds and bytes, and how its model is best cut. Torch is used to measure only."""
