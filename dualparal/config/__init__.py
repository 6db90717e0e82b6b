"""What the user asks for, checked once: frozen values without torch, which import nothing of ours."""
