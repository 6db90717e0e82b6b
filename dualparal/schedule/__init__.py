"""The order of work as a value, its replay, its proof and its simulation. No torch."""
