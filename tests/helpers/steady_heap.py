"""The environment in which a process gives its memory back, so that its peak can be measured."""

# glibc gives large buffers back at once, so that the peak is what is held and not how the heap fell out.
STEADY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
