"""Ranks, and what travels between them: groups, handshakes, edges, prompts. What the tensors mean is not known here."""
