"""The exit codes of the command line and of its ranks, in one place: scripts and schedulers read them."""

BAD_INPUT = 2  # the caller's mistake
RANK_FAILED = 3
NO_PROGRESS = 4  # no heartbeat, or nothing done for too long
STORAGE = 5  # reading or writing failed
NUMERICS = 6  # NaN or infinity in latents
