"""The version of this package, in one place: the build reads it without importing anything else."""

__version__ = "0.1.0"
