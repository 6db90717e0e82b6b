"""``python -m dualparal.cli``, for torchrun and other launchers."""

from dualparal.cli.main import main

main()
