"""Units that messages and cost models share."""

GIB = 2**30  # bytes
