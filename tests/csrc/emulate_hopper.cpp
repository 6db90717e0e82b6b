// Runs csrc/attention_hopper_kernel.h on a CPU: the kernel's own code over a model of the hardware.
//
// Every CUDA thread is a fiber; a seeded scheduler picks who goes on, and when a copy or a product that was issued
// takes place. The model follows the PTX ISA (9.0): swizzled boxes of TMA with zeros out of bounds, shared memory
// descriptors and fragments of wgmma, phases of mbarrier, named barriers. It is written from that document and shares
// no arithmetic of layouts with the kernel. It stops at
//   - a deadlock, and barriers that are left half full,
//   - a box that TMA writes while a product or a store may still read it, and the other way round,
//   - shared memory that a copy reads before ordinary writes to it were published,
// and what is read too early is NaN: accumulators between issue and wait, boxes between issue and arrival.
//
//   emulate_hopper DTYPE HEAD_DIM Q_ROWS K_ROWS HEADS PADDING SEED
//
// prints the largest error of the output relative to its largest value, and of the log-sum-exp.
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "attention_hopper_kernel.h"
#include "rows.h"

namespace {

using dualparal::DType;

[[noreturn]] void stop(const char* why) {
    std::fprintf(stderr, "%s\n", why);
    std::exit(1);
}
void require(bool condition, const char* otherwise) {
    if (!condition) stop(otherwise);
}

const float kNan = std::nanf("");
DType dtype;

float decode(uint16_t bits) {
    float value;
    dualparal::load_row(dtype, &bits, 1, &value);
    return value;
}
uint16_t encode(float value) {
    uint16_t bits;
    dualparal::store_row(dtype, &value, 1, &bits);
    return bits;
}

// A tensor map: a matrix of 16-bit elements, moved in boxes of `box_rows` x 64 with the 128-byte swizzle.
struct Matrix {
    uint16_t* data;
    int rows, columns, stride, box_rows;
};

// Fibers ------------------------------------------------------------------------------------------------------------

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(64 << 10);
    std::function<bool()> ready;  // empty: it can go on
    bool done = false;
};

constexpr int kThreads = 384;
std::mt19937 chance;
std::vector<std::unique_ptr<Fiber>> fibers;
ucontext_t scheduler;
int current;
int block_x, block_y;

void wait_until(std::function<bool()> ready) {
    if (ready() && chance() % 4) return;  // now and then another goes first anyway
    fibers[current]->ready = std::move(ready);
    swapcontext(&fibers[current]->context, &scheduler);
}

// Shared memory -----------------------------------------------------------------------------------------------------

constexpr uint32_t kBase = 3 * 1024;  // not 0, and a multiple of 1024 only
constexpr uint32_t kMemory = 232448 + 1024;
std::vector<unsigned char> memory;
// Of every element, by its address: copies that write it; products and stores that read it; ordinary writes.
std::vector<int> writers, readers, unpublished;
std::set<uint32_t> written_by[kThreads];

uint16_t load16(uint32_t address) {
    require(address % 2 == 0 && address >= kBase && address + 2 <= kMemory, "wgmma or TMA outside of shared memory");
    return uint16_t(memory[address] | memory[address + 1] << 8);
}
void store16(uint32_t address, uint16_t bits) {
    require(address % 2 == 0 && address >= kBase && address + 2 <= kMemory, "TMA outside of shared memory");
    memory[address] = (unsigned char)bits;
    memory[address + 1] = (unsigned char)(bits >> 8);
}
// Bits 4 to 6 of the address are exclusive-ored with bits 7 to 9.
uint32_t swizzle(uint32_t address) { return address ^ (address >> 3 & 0x70); }

struct Barrier {
    int arrivals, pending, bytes = 0, phase = 0;
    void check() {
        require(pending >= 0, "more arrivals at an mbarrier than it was made for");
        if (pending == 0 && bytes == 0) {
            pending = arrivals;
            ++phase;
        }
    }
};
std::map<uint32_t, Barrier> barriers;
Barrier& barrier_at(uint32_t address) {
    require(barriers.count(address), "no mbarrier was made there");
    return barriers[address];
}

struct Named {
    int arrived = 0, phase = 0;
};
Named named[16];
void arrive_named(int id, int threads) {
    if (++named[id].arrived == threads) {
        named[id].arrived = 0;
        ++named[id].phase;
    }
    require(named[id].arrived < threads, "more threads at a named barrier than it is for");
}
void sync_named(int id, int threads) {
    const int phase = named[id].phase;
    arrive_named(id, threads);
    wait_until([=] { return named[id].phase != phase; });
}

// Copies ------------------------------------------------------------------------------------------------------------

std::list<std::function<void()>> copies;  // issued, not yet made; in any order
int stores;

std::vector<uint32_t> box_addresses(uint32_t start, int rows) {
    require(start % 128 == 0, "a TMA box does not start at a multiple of 128 bytes");
    std::vector<uint32_t> addresses;
    for (int row = 0; row < rows; ++row) {
        for (int column = 0; column < 64; ++column) addresses.push_back(swizzle(start + row * 128 + column * 2));
    }
    return addresses;
}

// Products ----------------------------------------------------------------------------------------------------------

struct Product {
    int n = 0, issued = 0, made = 0;  // threads that issued it, warps whose 16 rows are done
    bool add = false, right_contiguous = false;  // is N contiguous in the right operand, or K
    bool from_registers = false;
    uint64_t a = 0, b = 0;
    float* d[128];
    const uint32_t* registers[128];
    std::vector<uint32_t> read;
};
struct Warpgroup {
    std::list<Product> products;              // issued by some of the threads or by all, in order
    long first = 0;                           // number of products.front()
    long made[4] = {};                        // products whose 16 rows are done, for each warp
    long issued[128] = {}, waited[128] = {};  // by each thread
    std::vector<long> groups[128];            // by each thread: the number of products when it committed
    // Accumulators under way: what they really hold, and how many products still use them.
    std::map<float*, std::pair<std::vector<float>, int>> under_way;
};
Warpgroup warpgroups[3];

// Element (row, column) of an operand. K-major: rows of 128 bytes, eight of them together, `stride` to the next eight.
// MN-major: 64 columns by eight rows together, `leading` to the next 64 columns, `stride` to the next eight rows.
uint32_t operand_address(uint64_t descriptor, int row, int column, bool column_contiguous_blocks) {
    require(descriptor >> 62 == 1, "the descriptor does not say 128-byte swizzle");
    require((descriptor >> 49 & 7) == 0, "base offset");
    const uint32_t start = uint32_t(descriptor & 0x3fff) << 4;
    const uint32_t leading = uint32_t(descriptor >> 16 & 0x3fff) << 4, stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
    uint32_t linear = start + row / 8 * stride + row % 8 * 128;
    if (column_contiguous_blocks) {
        linear += column / 64 * leading + column % 64 * 2;
    } else {
        linear += column * 2;  // 16 columns of 128 bytes; leading is not used
    }
    return swizzle(linear);
}

// The 16 rows of one warp: a warp that waited knows of its own rows only.
void make(Warpgroup& group, Product& product, int warp) {
    const int n = product.n;
    std::vector<float> a(16 * 16), b(16 * n);
    for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < 16; ++k) {
            if (product.from_registers) {
                // PTX, "register fragments for wgmma.mma_async.m64nNk16", matrix A.
                const int lane = row % 8 * 4 + k % 8 / 2, r = (row >= 8 ? 1 : 0) + (k >= 8 ? 2 : 0);
                a[row * 16 + k] = decode(uint16_t(product.registers[warp * 32 + lane][r] >> (k % 2 * 16)));
            } else {
                a[row * 16 + k] = decode(load16(operand_address(product.a, warp * 16 + row, k, false)));
            }
        }
    }
    for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < n; ++column) {
            const uint32_t address = product.right_contiguous ? operand_address(product.b, k, column, true)
                                                              : operand_address(product.b, column, k, false);
            b[k * n + column] = decode(load16(address));
        }
    }
    for (int row = 0; row < 16; ++row) {
        for (int column = 0; column < n; ++column) {
            // The same, matrix D.
            const int lane = row % 8 * 4 + column % 8 / 2, i = column / 8 * 4 + (row >= 8 ? 2 : 0) + column % 2;
            float& sum = group.under_way[product.d[warp * 32 + lane]].first[i];
            if (!product.add) sum = 0.0f;
            for (int k = 0; k < 16; ++k) sum += a[row * 16 + k] * b[k * n + column];
        }
    }
    for (int thread = warp * 32; thread < warp * 32 + 32; ++thread) {
        float* d = product.d[thread];
        auto& [values, uses] = group.under_way[d];
        if (--uses == 0) {
            std::copy(values.begin(), values.end(), d);
            group.under_way.erase(d);
        }
    }
    ++group.made[warp];
    if (++product.made == 4) {
        for (uint32_t address : product.read) --readers[address];
    }
    while (!group.products.empty() && group.products.front().made == 4) {
        group.products.pop_front();
        ++group.first;
    }
}

void issue(float* d, int n, const uint32_t* registers, uint64_t a, uint64_t b, bool add) {
    Warpgroup& group = warpgroups[current / 128];
    const int thread = current % 128;
    const long number = group.issued[thread]++;
    while (group.first + long(group.products.size()) <= number) group.products.emplace_back();
    Product& product = *std::next(group.products.begin(), number - group.first);
    if (product.issued == 0) {
        product.n = n;
        product.add = add;
        product.from_registers = product.right_contiguous = registers != nullptr;
        product.a = a;
        product.b = b;
        for (int row = 0; row < (registers ? 16 : n); ++row) {
            for (int column = 0; column < (registers ? n : 16); ++column) {
                product.read.push_back(operand_address(b, row, column, registers != nullptr));
            }
        }
        for (int row = 0; row < (registers ? 0 : 64); ++row) {
            for (int column = 0; column < 16; ++column) product.read.push_back(operand_address(a, row, column, false));
        }
        for (uint32_t address : product.read) {
            require(!writers[address], "a product reads what a copy is writing");
            require(!unpublished[address], "a product reads what was not published");
            ++readers[address];
        }
    }
    require(product.n == n && product.a == a && product.b == b && product.add == add, "threads issue other products");
    product.d[thread] = d;
    product.registers[thread] = registers;
    auto& [values, uses] = group.under_way[d];
    if (uses++ == 0) {
        values.assign(d, d + n / 2);
        std::fill(d, d + n / 2, kNan);
    }
    ++product.issued;
}

// One product or copy that can be made, by chance; false when there is none.
bool work(bool products, bool other) {
    std::vector<std::function<void()>> possible;
    for (Warpgroup& group : warpgroups) {
        if (!products) break;
        for (int warp = 0; warp < 4; ++warp) {
            const long next = group.made[warp] - group.first;
            if (next >= long(group.products.size())) continue;
            Product& product = *std::next(group.products.begin(), next);
            if (product.issued == 128) possible.push_back([&group, &product, warp] { make(group, product, warp); });
        }
    }
    for (auto copy = copies.begin(); other && copy != copies.end(); ++copy) {
        possible.push_back([copy] {
            (*copy)();
            copies.erase(copy);
        });
    }
    if (possible.empty()) return false;
    possible[chance() % possible.size()]();
    return true;
}

// What the kernel calls ---------------------------------------------------------------------------------------------

struct Emulated {
    using Map = const Matrix*;
    static int thread() { return current; }
    static int group() { return current / 128; }
    static int block_x() { return ::block_x; }
    static int block_y() { return ::block_y; }
    template <int>
    static void shrink_registers() {}
    template <int>
    static void grow_registers() {}

    static void sync_block() { sync_named(0, kThreads); }
    static void wait_turn(int consumer) { sync_named(1 + consumer, 256); }
    static void pass_turn(int consumer) { arrive_named(1 + consumer, 256); }
    static void sync_group(int consumer) { sync_named(3 + consumer, 128); }

    static void init(uint32_t address, int arrivals) {
        require(address % 8 == 0 && address + 8 <= kMemory, "an mbarrier is 8 bytes, aligned");
        barriers[address] = {arrivals, arrivals};
    }
    static void publish_barriers() {}
    static void expect(uint32_t address, uint32_t bytes) {
        Barrier& barrier = barrier_at(address);
        barrier.bytes += int(bytes);
        --barrier.pending;
        barrier.check();
    }
    static void arrive(uint32_t address) {
        Barrier& barrier = barrier_at(address);
        --barrier.pending;
        barrier.check();
    }
    static void wait(uint32_t address, uint32_t parity) {
        wait_until([=] { return uint32_t(barrier_at(address).phase & 1) != parity; });
    }

    static void load(uint32_t to, Map map, int column, int row, uint32_t barrier) {
        const auto addresses = box_addresses(to, map->box_rows);
        for (uint32_t address : addresses) {
            require(!readers[address] && !writers[address], "a copy writes what is being read or written");
            ++writers[address];
            store16(address, encode(kNan));
        }
        copies.push_back([=] {
            for (size_t i = 0; i < addresses.size(); ++i) {
                const int at_row = row + int(i / 64), at_column = column + int(i % 64);
                const bool inside = at_row >= 0 && at_row < map->rows && at_column >= 0 && at_column < map->columns;
                store16(addresses[i], inside ? map->data[int64_t(at_row) * map->stride + at_column] : 0);
                --writers[addresses[i]];
            }
            barrier_at(barrier).bytes -= int(addresses.size() * 2);
            barrier_at(barrier).check();
        });
    }
    static void store(Map map, int column, int row, uint32_t from) {
        const auto addresses = box_addresses(from, map->box_rows);
        for (uint32_t address : addresses) {
            require(!writers[address] && !unpublished[address], "a store reads what is not written or not published");
            ++readers[address];
        }
        ++stores;
        copies.push_back([=] {
            for (size_t i = 0; i < addresses.size(); ++i) {
                const int at_row = row + int(i / 64), at_column = column + int(i % 64);
                --readers[addresses[i]];
                if (at_row >= map->rows || at_column >= map->columns) continue;
                map->data[int64_t(at_row) * map->stride + at_column] = load16(addresses[i]);
            }
            --stores;
        });
    }
    static void wait_stores() {
        wait_until([] { return stores == 0; });
    }
    static void write(uint32_t to, uint32_t value) {
        for (uint32_t address : {to, to + 2}) {
            require(!readers[address] && !writers[address], "a write to what is being read or written");
            unpublished[address] = 1;
            written_by[current].insert(address);
            store16(address, uint16_t(address == to ? value : value >> 16));
        }
    }
    static void publish_writes() {
        for (uint32_t address : written_by[current]) unpublished[address] = 0;
        written_by[current].clear();
    }

    template <class... Arrays>
    static void fence(Arrays&...) {}
    static void commit() {
        Warpgroup& group = warpgroups[current / 128];
        group.groups[current % 128].push_back(group.issued[current % 128]);
    }
    template <int kPending, class... Arrays>
    static void wait_products(Arrays&...) {
        Warpgroup& group = warpgroups[current / 128];
        const auto& groups = group.groups[current % 128];
        if (groups.size() <= kPending) return;
        const long until = groups[groups.size() - 1 - kPending];
        const int warp = current % 128 / 32;
        wait_until([&group, until, warp] { return group.made[warp] >= until; });
    }
    template <DType>
    static void multiply(float (&d)[64], uint64_t a, uint64_t b, bool add) {
        issue(d, 128, nullptr, a, b, add);
    }
    template <DType, int N>
    static void multiply(float (&d)[N], const uint32_t (&a)[4], uint64_t b) {
        issue(d, 2 * N, a, 0, b, true);
    }

    template <int kMask>
    static float shuffle(float x) {
        static float values[kThreads];
        static int arrived[kThreads / 32], phase[kThreads / 32];
        const int warp = current / 32;
        const auto meet = [&] {
            const int before = phase[warp];
            if (++arrived[warp] == 32) {
                arrived[warp] = 0;
                ++phase[warp];
            }
            wait_until([=] { return phase[warp] != before; });
        };
        values[current] = x;
        meet();
        const float other = values[current ^ kMask];
        meet();
        return other;
    }
    static float exp2(float x) { return std::exp2(x); }
    template <DType>
    static uint32_t pack(float low, float high) {
        return encode(low) | uint32_t(encode(high)) << 16;
    }
};

std::function<void()> entry;
void run_fiber() {
    entry();
    fibers[current]->done = true;
    swapcontext(&fibers[current]->context, &scheduler);
}

void run_block() {
    memory.assign(kMemory, 0xff);  // NaN
    writers.assign(kMemory, 0);
    readers.assign(kMemory, 0);
    unpublished.assign(kMemory, 0);
    barriers.clear();
    for (auto& one : named) one = {};
    for (auto& one : warpgroups) one = {};
    fibers.clear();
    for (int i = 0; i < kThreads; ++i) {
        fibers.push_back(std::make_unique<Fiber>());
        Fiber& fiber = *fibers.back();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
    }
    // Warps are favoured or held back, and copies or products may be so slow that everybody waits for them.
    const int paces[] = {1, 8, 1000000};
    const int product_pace = paces[chance() % 3], copy_pace = paces[chance() % 3];
    while (true) {
        const int favoured = int(chance() % 12), start = int(chance() % kThreads);
        bool moved = false, alive = false;
        for (int turn = 0; turn < kThreads; ++turn) {
            const int thread = (start + turn) % kThreads;
            Fiber& fiber = *fibers[thread];
            alive |= !fiber.done;
            if (fiber.done || (chance() % 8 && thread / 32 != favoured)) continue;
            if (fiber.ready && !fiber.ready()) continue;
            fiber.ready = nullptr;
            current = thread;
            moved = true;
            swapcontext(&scheduler, &fiber.context);
        }
        if (!alive) break;
        moved |= work(chance() % product_pace == 0, chance() % copy_pace == 0);
        if (moved) continue;
        bool stuck = true;  // or only held back?
        for (auto& fiber : fibers) stuck &= fiber->done || (fiber->ready && !fiber->ready());
        if (stuck) require(work(true, true), "deadlock");
    }
    require(copies.empty() && stores == 0, "the thread block ended before its copies");
    for (auto& one : named) require(one.arrived == 0, "a named barrier was left half full");
    for (auto& group : warpgroups) require(group.products.empty(), "the thread block ended before its products");
    for (auto& [address, barrier] : barriers) {
        require(barrier.bytes == 0 && barrier.pending == barrier.arrivals, "an mbarrier was left half full");
    }
}

template <DType kType, int kHeadDim>
void attend(const dualparal::hopper::Problem& problem, const Matrix& q, const Matrix& k, const Matrix& v,
            const Matrix& out, int heads) {
    using namespace dualparal::hopper;
    static_assert(kBase + Shared<kHeadDim>::kBytes <= kMemory);
    entry = [&] { dualparal::hopper::attend<Emulated, kType, kHeadDim>(problem, kBase, &q, &k, &v, &out); };
    for (block_y = 0; block_y < heads; ++block_y) {
        for (block_x = 0; block_x < tiles(problem.q_rows, kBlockM); ++block_x) run_block();
    }
}

}  // namespace

int main(int count, char** arguments) {
    require(count == 8, "usage: emulate_hopper DTYPE HEAD_DIM Q_ROWS K_ROWS HEADS PADDING SEED");
    int numbers[7];
    for (int i = 0; i < 7; ++i) numbers[i] = std::atoi(arguments[i + 1]);
    const auto [code, head_dim, q_rows, k_rows, heads, padding, seed] = numbers;
    dtype = dualparal::to_dtype(code);
    chance.seed(unsigned(seed));
    const int inner = heads * head_dim, stride = inner + padding;

    std::normal_distribution<float> normal;
    const auto filled = [&](int rows, int from) {  // NaN between the rows and after them
        std::vector<uint16_t> values(size_t(rows + 3) * stride, encode(kNan));
        for (int row = 0; row < rows; ++row) {
            for (int i = 0; i < inner; ++i) values[size_t(row) * stride + i] = encode(normal(chance) * float(from));
        }
        return values;
    };
    auto q = filled(q_rows, 2), k = filled(k_rows, 1), v = filled(k_rows, 1);
    std::vector<uint16_t> out(size_t(q_rows + 1) * inner, encode(kNan));
    std::vector<float> lse(size_t(heads) * q_rows, kNan);
    const Matrix maps[] = {{q.data(), q_rows, inner, stride, 64},
                           {k.data(), k_rows, inner, stride, 128},
                           {v.data(), k_rows, inner, stride, 128},
                           {out.data(), q_rows, inner, inner, 64}};
    const dualparal::hopper::Problem problem{lse.data(), q_rows, k_rows,
                                             float(1.4426950408889634 / std::sqrt(double(head_dim)))};
    const auto run = dtype == DType::bf16 ? (head_dim == 64 ? attend<DType::bf16, 64> : attend<DType::bf16, 128>)
                                          : (head_dim == 64 ? attend<DType::f16, 64> : attend<DType::f16, 128>);
    run(problem, maps[0], maps[1], maps[2], maps[3], heads);

    double largest = 0, error = 0, lse_error = 0;
    for (int head = 0; head < heads; ++head) {
        for (int row = 0; row < q_rows; ++row) {
            std::vector<double> weights(k_rows), sums(head_dim);
            double total = 0;
            for (int key = 0; key < k_rows; ++key) {
                double logit = 0;
                for (int i = 0; i < head_dim; ++i) {
                    logit += double(decode(q[size_t(row) * stride + head * head_dim + i])) *
                             decode(k[size_t(key) * stride + head * head_dim + i]);
                }
                total += weights[key] = std::exp(logit / std::sqrt(double(head_dim)));
                for (int i = 0; i < head_dim; ++i) {
                    sums[i] += weights[key] * decode(v[size_t(key) * stride + head * head_dim + i]);
                }
            }
            const double difference = std::abs(lse[size_t(head) * q_rows + row] - std::log(total));
            lse_error = std::isnan(difference) ? difference : std::max(lse_error, difference);
            require(!std::isnan(difference), "NaN in the log-sum-exp");
            for (int i = 0; i < head_dim; ++i) {
                const double truth = sums[i] / total, ours = decode(out[size_t(row) * inner + head * head_dim + i]);
                require(!std::isnan(ours), "NaN in the output");
                largest = std::max(largest, std::abs(truth));
                error = std::max(error, std::abs(truth - ours));
            }
        }
    }
    for (int i = 0; i < inner; ++i) {
        require(std::isnan(decode(out[size_t(q_rows) * inner + i])), "a row after the last one was written");
    }
    std::printf("%.3g %.3g\n", error / largest, lse_error);
}
