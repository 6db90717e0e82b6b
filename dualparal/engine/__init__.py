"""The public engine: requests, what they need, and the run that serves them."""
