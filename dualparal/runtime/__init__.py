"""Walks a schedule: stages, their features and workspaces, the queue of blocks."""
