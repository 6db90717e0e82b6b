"""Starts ranks as processes, hears them, names the culprit and leaves none behind. No torch."""
