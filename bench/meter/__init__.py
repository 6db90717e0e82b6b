"""The figures of quality.py: of one video, of many, and the rival FIFO."""
