// Looks at every load and store of a kernel, before it takes place.
//
// The kernels are compiled with g++ -fsanitize=thread, which calls __tsan_readN and __tsan_writeN for each access; the
// library of that sanitizer is not linked, these functions are. They stop at
//   - an access outside of the tensors that the call was given, of the block's shared memory and of the thread's stack,
//   - a read of an output, a write to an input, an element of an output that is written twice or not at all,
//   - an address that is no multiple of what is moved at once, up to 16 bytes,
//   - shared memory that is read before it is written, and that two threads use between two barriers, one of them
//     writing: whatever order they really ran in.
// -fsanitize=bounds adds the indices of arrays whose length is known.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"
#include "emulation.h"

// The linker's names for the section of `__shared__`; a kernel without any has none.
extern "C" char __start_shared_memory[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_shared_memory[] __attribute__((weak, visibility("hidden")));

namespace emulated {
namespace {

struct Range {
    std::string name;
    uintptr_t first, last;
    std::vector<bool> written;  // of an output, by byte; empty: an input
};
std::vector<Range> tensors;

constexpr int kNobody = -1, kMany = -2;
struct SharedByte {
    bool written = false;
    int barriers = 0, writer = kNobody, reader = kNobody;  // since so many barriers
};
std::vector<float> dynamic;
std::vector<SharedByte> dynamic_state, static_state;

uintptr_t number(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

void use_shared(std::vector<SharedByte>& state, size_t at, size_t size, bool write) {
    if (at + size > state.size()) fault("%zu bytes behind the end of shared memory", at + size - state.size());
    for (SharedByte* byte = &state[at]; byte != &state[at] + size; ++byte) {
        if (byte->barriers != barriers) *byte = {byte->written, barriers, kNobody, kNobody};
        const bool written_by_another = byte->writer != kNobody && byte->writer != current;
        const bool read_by_another = byte->reader != kNobody && byte->reader != current;
        if (written_by_another || (write && read_by_another)) {
            fault("race: thread %d %s byte %zu of shared memory that thread %d %s since the last barrier", current,
                  write ? "writes" : "reads", at, written_by_another ? byte->writer : byte->reader,
                  written_by_another ? "wrote" : "read");
        }
        if (!write && !byte->written) fault("shared memory is read at byte %zu, where nobody wrote", at);
        if (write) {
            byte->writer = current;
            byte->written = true;
        } else {
            byte->reader = read_by_another ? kMany : current;
        }
    }
}

void use_tensor(uintptr_t address, size_t size, bool write) {
    const Range* nearest = nullptr;
    for (Range& tensor : tensors) {
        if (address < tensor.first) continue;
        if (address >= tensor.last) {
            if (!nearest || tensor.last > nearest->last) nearest = &tensor;
            continue;
        }
        const size_t at = address - tensor.first;
        const char* name = tensor.name.c_str();
        if (address + size > tensor.last) fault("%zu bytes at byte %zu of %s go beyond its end", size, at, name);
        if (write == tensor.written.empty()) fault("%s is %s", name, write ? "written, an input" : "read, an output");
        for (size_t i = at; write && i < at + size; ++i) {
            if (tensor.written[i]) fault("byte %zu of %s is written twice", i, name);
            tensor.written[i] = true;
        }
        return;
    }
    if (!nearest) fault("an address in front of every tensor is used");
    fault("an address outside of every tensor is used, %zu bytes behind the end of %s", size_t(address - nearest->last),
          nearest->name.c_str());
}

void use(const void* pointer, size_t size, bool write) {
    if (current < 0) return;  // the host may do as it likes
    step();
    const uintptr_t address = number(pointer);
    const Stack stack = stack_of_current();
    if (address >= stack.first && address + size <= stack.last) return;
    for (const dim3* index : {&threadIdx, &blockIdx, &blockDim, &gridDim}) {
        if (!write && address >= number(index) && address + size <= number(index + 1)) return;
    }
    const size_t unit = size & (~size + 1);  // the largest power of two in it
    if (address % std::min<size_t>(unit, 16)) fault("misaligned: %zu bytes at once at address ...%x", size, unsigned(address % 16));
    if (address >= number(__start_shared_memory) && address < number(__stop_shared_memory)) {
        use_shared(static_state, address - number(__start_shared_memory), size, write);
    } else if (address >= number(dynamic.data()) && address < number(dynamic.data() + dynamic.size())) {
        use_shared(dynamic_state, address - number(dynamic.data()), size, write);
    } else {
        use_tensor(address, size, write);
    }
}

}  // namespace

void* dynamic_shared() { return dynamic.data(); }
size_t static_shared_bytes() { return size_t(__stop_shared_memory - __start_shared_memory); }

void new_shared(size_t dynamic_bytes) {
    // As much again behind it, so that what a kernel would take for its own is seen to be not.
    dynamic.resize(dynamic_bytes / 2 + 64);
    std::memset(dynamic.data(), 0xff, dynamic.size() * sizeof(float));
    std::memset(__start_shared_memory, 0xff, static_shared_bytes());
    dynamic_state.assign(dynamic_bytes, {});
    static_state.assign(static_shared_bytes(), {});
}

const char* not_written() {
    static std::string words;
    words.clear();
    for (const Range& tensor : tensors) {
        const auto missing = std::find(tensor.written.begin(), tensor.written.end(), false);
        if (missing == tensor.written.end()) continue;
        words = "byte " + std::to_string(missing - tensor.written.begin()) + " of " + tensor.name + " is not written";
    }
    return words.c_str();
}

void forget_tensors() { tensors.clear(); }

}  // namespace emulated

// A tensor of the next launch, as a matrix: between its rows nothing may be touched.
extern "C" __attribute__((visibility("default"))) void tensor(const char* name, uintptr_t start, size_t rows,
                                                              size_t row_bytes, size_t stride_bytes, int output) {
    for (size_t row = 0; row < rows; ++row) {
        const uintptr_t first = start + row * stride_bytes;
        const std::string row_name = rows > 1 ? std::string(name) + " row " + std::to_string(row) : name;
        emulated::tensors.push_back({row_name, first, first + row_bytes, std::vector<bool>(output ? row_bytes : 0)});
    }
}

// What the compiler calls.
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define ACCESS(size)                                                         \
    void __tsan_read##size(void* at) { emulated::use(at, size, false); }     \
    void __tsan_write##size(void* at) { emulated::use(at, size, true); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* at, size_t size) { emulated::use(at, size, false); }
void __tsan_write_range(void* at, size_t size) { emulated::use(at, size, true); }
void __tsan_vptr_update(void**, void*) {}
void __ubsan_handle_out_of_bounds(void*, uintptr_t index) {
    if (emulated::current >= 0) emulated::fault("index %td of an array that is shorter", ptrdiff_t(index));
}
}
