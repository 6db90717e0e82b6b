"""The user's choices, checked once: frozen values without torch, which import nothing of ours."""
