"""Wan2.1 and Wan2.2 text-to-video: the only package that knows this family."""
