"""What a run tells of itself: clocks, statistics, a timeline and its picture."""
