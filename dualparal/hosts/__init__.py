"""Long video inside programs of others: diffusers' own pipelines and its modular blocks."""
