// out = x @ weight^T + bias with a packed weight (linear_layout.h): how the work is cut; the arithmetic is in
// linear_<isa>.h.
//
// Each thread owns a rectangle of the output (a range of rows x a range of panels) and goes through its rows in blocks
// that fit its L2 cache; each block meets every panel of the range. There is one parallel region and no barrier inside
// it.
#include "linear_amx.h"
#include "linear_avx2.h"
#include "linear_avx512.h"

#include <cstdlib>
#include <utility>

namespace quire {
namespace {

// Of x as the kernels read it, per block of rows. Smaller blocks read the weights more often; larger ones fall out of
// L2, which is 2 MiB where there is AMX and at least 512 KiB on a server elsewhere.
#if defined(QUIRE_HAS_AMX)
constexpr int64_t kBlockBytes = 1024 * 1024;
#else
constexpr int64_t kBlockBytes = 256 * 1024;
#endif

constexpr int64_t kLargeOutputBytes = 1024 * 1024;
constexpr int64_t kRowTile = 32;  // rows are shared out in multiples of this

// A thread's own scratch memory; grows to the largest block that it has met and is kept.
XElement* scratch(int64_t count) {
    static thread_local struct Buffer {
        void* memory = nullptr;
        int64_t size = 0;
        ~Buffer() { std::free(memory); }
    } buffer;
    const int64_t size = ceil_div(count * static_cast<int64_t>(sizeof(XElement)), 64) * 64;
    if (size > buffer.size) {
        std::free(buffer.memory);
        buffer.memory = std::aligned_alloc(64, static_cast<size_t>(size));
        if (buffer.memory == nullptr) std::abort();
        buffer.size = size;
    }
    return static_cast<XElement*>(buffer.memory);
}

// Rows [begin, end) of x as the kernels read them: x itself where it needs neither widening nor padding.
RowBlock<XElement> prepare_rows(const LinearArguments& a, int64_t begin, int64_t end) {
    const int64_t k_end = padded_k(a.k);
    const bf16* source = a.x + begin * a.stride_x;
#if defined(QUIRE_HAS_AVX512)
    if (k_end == a.k) return {source, a.stride_x, end - begin, begin};
#endif
    XElement* copy = scratch((end - begin) * k_end);
    for (int64_t row = 0; row < end - begin; ++row, source += a.stride_x) {
        XElement* target = copy + row * k_end;
#if defined(QUIRE_HAS_AVX512)
        std::memcpy(target, source, a.k * sizeof(bf16));
#else
        int64_t k = 0;
        for (; k + kVecWidth <= a.k; k += kVecWidth) vec_store(target + k, vec_load(source + k));
        for (; k < a.k; ++k) target[k] = to_float(source[k]);
#endif
        std::memset(target + a.k, 0, (k_end - a.k) * sizeof(XElement));
    }
    return {copy, k_end, end - begin, begin};
}

using RowsKernel = void (*)(const LinearArguments&, const RowBlock<XElement>&, int64_t, int64_t, const PanelOutput&);

template <int... kIndex>
constexpr RowsKernel kernel_for(int rows, std::integer_sequence<int, kIndex...>) {
    constexpr RowsKernel kernels[] = {multiply_rows<kIndex + 1>...};
    return kernels[rows - 1];
}

// The rows in groups of at most kMaxRows whose sizes differ by at most one; each panel stays in L1 for all of them.
void multiply_block_vectors(const LinearArguments& a, const RowBlock<XElement>& x, Range panels, bool is_large) {
    const int64_t num_groups = ceil_div(x.count, kMaxRows);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        PanelOutput output;
        output.open(a, panel, is_large);
        for (int64_t group = 0; group < num_groups; ++group) {
            const Range rows = share_of(x.count, group, num_groups);
            const int size = static_cast<int>(rows.end - rows.begin);
            kernel_for(size, std::make_integer_sequence<int, kMaxRows>())(a, x, rows.begin, panel, output);
        }
    }
}

void multiply_block(const LinearArguments& a, int64_t begin, int64_t end, Range panels, bool is_large) {
#if defined(QUIRE_HAS_AMX)
    const int64_t count = end - begin;
    if (count > kTileRows) {
        XElement* packed = scratch(packed_groups_size(a, count));
        return multiply_groups_amx(a, pack_groups(a, begin, end, packed), panels, is_large);
    }
    if (count >= kMinAmxRows) return multiply_few_amx(a, prepare_rows(a, begin, end), panels);
#endif
    multiply_block_vectors(a, prepare_rows(a, begin, end), panels, is_large);
}

// Whether a thread's share of the output would push everything else out of its L2, and consists of whole cache lines.
// Such an output is written past the caches, which saves reading its lines before they are overwritten.
bool is_large_output(const LinearArguments& a, Range rows, Range panels) {
    const int64_t size = a.is_out_float ? sizeof(float) : sizeof(bf16);
    const bool is_aligned = reinterpret_cast<uintptr_t>(a.out) % 64 == 0 && a.stride_out * size % 64 == 0;
    return is_aligned && (rows.end - rows.begin) * (panels.end - panels.begin) * kPanel * size > kLargeOutputBytes;
}

void multiply_rectangle(const LinearArguments& a, Range rows, Range panels) {
    if (panels.begin == panels.end) return;
    const bool is_large = is_large_output(a, rows, panels);
    int64_t block = kBlockBytes / (padded_k(a.k) * static_cast<int64_t>(sizeof(XElement))) / kRowTile * kRowTile;
    block = block < kRowTile ? kRowTile : block;
    for (int64_t begin = rows.begin; begin < rows.end; begin += block) {
        multiply_block(a, begin, begin + block < rows.end ? begin + block : rows.end, panels, is_large);
    }
    if (is_large) _mm_sfence();  // streamed stores are ordered before what the team does next
}

// How many parts the rows are cut into; the other factor of the team cuts the panels. The largest rectangle decides the
// time; of equals the one with fewer row parts wins, since then fewer threads read the same weights.
int64_t choose_row_parts(int64_t num_row_tiles, int64_t panels, int64_t team) {
    int64_t best_parts = 1, best_cost = std::numeric_limits<int64_t>::max();
    for (int64_t parts = 1; parts <= team; ++parts) {
        const int64_t cost = ceil_div(num_row_tiles, parts) * ceil_div(panels, team / parts);
        if (cost < best_cost) best_cost = cost, best_parts = parts;
    }
    return best_parts;
}

}  // namespace
}  // namespace quire

using namespace quire;

// out[m][n] = x[m][k] @ weight[n][k]^T + bias[n]; float32 sums, one rounding at the end.
QUIRE_EXPORT void quire_linear_bf16(const LinearArguments* arguments) {
    const LinearArguments a = *arguments;
    const int64_t num_row_tiles = ceil_div(a.num_rows, kRowTile), panels = num_panels(a.n);
#pragma omp parallel if (a.n * a.k > 16384)
    {
        const int64_t team = omp_get_num_threads(), thread = omp_get_thread_num();
        const int64_t row_parts = choose_row_parts(num_row_tiles, panels, team);
        const int64_t panel_parts = team / row_parts;
        if (thread < row_parts * panel_parts) {
            const Range tiles = share_of(num_row_tiles, thread / panel_parts, row_parts);
            const int64_t end = tiles.end * kRowTile < a.num_rows ? tiles.end * kRowTile : a.num_rows;
            multiply_rectangle(a, {tiles.begin * kRowTile, end}, share_of(panels, thread % panel_parts, panel_parts));
        }
    }
}
