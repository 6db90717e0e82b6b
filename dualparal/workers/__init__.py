"""An engine whose ranks are processes that the caller's own process starts, keeps warm and ends."""
