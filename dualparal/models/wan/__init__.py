"""Wan2.1 and Wan2.2 text-to-video: all that is known of this family."""
