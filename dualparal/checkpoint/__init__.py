"""Snapshots of a run, from which another one goes on."""
