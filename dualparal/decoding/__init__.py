"""Final latents to frames, in the order in which they are finished."""
