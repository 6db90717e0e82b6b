// What threads.cpp and memory.cpp know of each other.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulated {

// Ends the launch with these words. Called by a thread of a kernel, never by the host.
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));
void step();  // counts what a thread does: one that goes on for ever is stopped

extern int current;   // the thread of the block that runs; -1: the host
extern int barriers;  // that the block has passed
struct Stack {
    uintptr_t first, last;
};
Stack stack_of_current();

// Shared memory of one thread block, full of NaN that nobody has written.
void new_shared(size_t dynamic_bytes);
size_t static_shared_bytes();

const char* not_written();  // of the outputs, in words; empty when all is
void forget_tensors();

}  // namespace emulated
