"""The account of a run: clocks, statistics, a timeline and its picture."""
