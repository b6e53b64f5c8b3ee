// One token per row of logits: the first maximum, or the inverse of the filtered distribution's cumulative sum.
//
// The order of filters and their ties are those of filter_logits_ref. Every filter keeps a prefix of the tokens by
// descending logit (equal logits: by ascending id), so a bound on the logit that provably keeps the whole prefix collects
// the few tokens that matter in one vector pass over the vocabulary, and only they are selected among, exactly. Nothing is
// sorted whole. Sums of probabilities are double, in the order of token ids.
#include "common.h"
#include "vec_compare.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace quire {

// Packed by sampling.py: eight bytes a field, in this order.
struct SamplingArguments {
    const float* logits;
    int64_t stride, num_rows, vocab_size;
    const double* temperature;
    const int64_t* top_k;
    const double *top_p, *min_p, *uniform;
    int64_t* out;
};

namespace {

constexpr double kNearZeroTemperature = 1e-5;  // reference.py: NEAR_ZERO_TEMPERATURE
constexpr int64_t kMaximaBlock = 64;
constexpr int64_t kSumBlock = 1024;

struct Candidate {
    float logit, weight;  // weight: exp((logit - maximum) / temperature)
    int64_t id;
};

struct Scratch {
    std::vector<Candidate> kept;     // by ascending id
    std::vector<Candidate> ordered;  // a copy to select among
    std::vector<float> maxima;
};

struct Row {
    const float* logits;
    int64_t vocab_size;
    float maximum;
    double temperature, min_p, top_p, uniform;
    int64_t top_k;  // 0: no limit
};

QUIRE_INLINE bool precedes(const Candidate& a, const Candidate& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

float span_maximum(const float* x, int64_t count) {
    Vec best = vec_set(-kInfinity);
    int64_t i = 0;
    for (; i + kVecWidth <= count; i += kVecWidth) best = vec_max(best, vec_load(x + i));
    if (i < count) best = vec_max(best, vec_keep(vec_load(x + i, count - i), count - i, vec_set(-kInfinity)));
    return reduce_max(best);
}

// The first id whose logit is at least `value`; 0 when there is none.
int64_t find_first(const float* x, int64_t count, float value) {
    const Vec wanted = vec_set(value);
    for (int64_t i = 0; i < count; i += kVecWidth) {
        const int64_t lanes_left = std::min<int64_t>(count - i, kVecWidth);
        const uint32_t valid = lanes_left == kVecWidth ? ~0u : (1u << lanes_left) - 1u;
        const uint32_t found = mask_ge(vec_load(x + i, lanes_left), wanted) & valid;
        if (found != 0) return i + __builtin_ctz(found);
    }
    return 0;
}

// Writes exp((x - maximum) / temperature) to `weights` and returns the sum.
double span_weights(const Row& row, const float* x, int64_t count, float* weights) {
    const Vec maximum = vec_set(row.maximum), inverse = vec_set(static_cast<float>(1.0 / row.temperature));
    Vec sum = vec_zero();
    for (int64_t i = 0; i < count; i += kVecWidth) {
        const int64_t lanes_left = std::min<int64_t>(count - i, kVecWidth);
        const Vec weight = vec_exp((vec_load(x + i, lanes_left) - maximum) * inverse);
        const Vec kept = vec_keep(weight, lanes_left, vec_zero());
        sum = sum + kept;
        if (weights != nullptr) vec_store(weights + i, kept, lanes_left);
    }
    return reduce_add(sum);
}

int64_t sample_unfiltered(const Row& row, Scratch& scratch) {
    const int64_t num_blocks = ceil_div(row.vocab_size, kSumBlock);
    const auto block_size = [&](int64_t block) { return std::min(kSumBlock, row.vocab_size - block * kSumBlock); };
    scratch.maxima.resize(static_cast<size_t>(num_blocks));
    double total = 0.0;
    for (int64_t block = 0; block < num_blocks; ++block) {
        const double sum = span_weights(row, row.logits + block * kSumBlock, block_size(block), nullptr);
        scratch.maxima[block] = static_cast<float>(sum);
        total += scratch.maxima[block];
    }
    const double target = row.uniform * total;
    double before = 0.0;
    int64_t last = 0;
    float weights[kSumBlock];
    for (int64_t block = 0; block < num_blocks; ++block) {
        const double sum = scratch.maxima[block];
        if (sum == 0.0 || (before + sum <= target && block + 1 < num_blocks)) {
            before += sum;
            continue;
        }
        span_weights(row, row.logits + block * kSumBlock, block_size(block), weights);
        for (int64_t i = 0; i < block_size(block); ++i) {
            if (weights[i] == 0.0f) continue;
            last = block * kSumBlock + i;
            before += weights[i];
            if (before > target) return last;
        }
    }
    return last;
}

// Every token that the filters keep has at least `logit`.
struct Bound {
    float logit;
    double total;  // the weight that top_p is a share of, where tokens below `logit` are part of it; otherwise 0
};

Bound find_bound(const Row& row, Scratch& scratch) {
    double bound = -kInfinity;
    if (row.min_p > 0.0) bound = row.maximum + row.temperature * std::log(std::min(row.min_p, 1.0));
    const int64_t num_blocks = ceil_div(row.vocab_size, kMaximaBlock);
    if (row.top_k > 0 && row.top_k <= num_blocks) {
        // At least k tokens reach the k-th largest of the blocks' maxima.
        scratch.maxima.resize(static_cast<size_t>(num_blocks));
        for (int64_t block = 0; block < num_blocks; ++block) {
            const int64_t begin = block * kMaximaBlock;
            scratch.maxima[block] = span_maximum(row.logits + begin, std::min(kMaximaBlock, row.vocab_size - begin));
        }
        const auto kth = scratch.maxima.begin() + (row.top_k - 1);
        std::nth_element(scratch.maxima.begin(), kth, scratch.maxima.end(), std::greater<float>());
        return {static_cast<float>(std::max<double>(bound, *kth)), 0.0};
    }
    if (row.top_k == 0 && row.top_p < 1.0 && row.min_p <= 0.0) {
        // Tokens below (1 - top_p) total / vocab_size weigh less than 1 - top_p together. Halved against rounding.
        double total = 0.0;
        for (int64_t i = 0; i < row.vocab_size; i += kSumBlock) {
            total += span_weights(row, row.logits + i, std::min(kSumBlock, row.vocab_size - i), nullptr);
        }
        const double weight = 0.5 * (1.0 - row.top_p) * total / static_cast<double>(row.vocab_size);
        return {static_cast<float>(row.maximum + row.temperature * std::log(weight)), total};
    }
    return {static_cast<float>(bound), 0.0};
}

void collect(const Row& row, float bound, std::vector<Candidate>& kept) {
    kept.clear();
    const Vec wanted = vec_set(std::max(bound, -std::numeric_limits<float>::max()));
    for (int64_t i = 0; i < row.vocab_size; i += kVecWidth) {
        const int64_t lanes_left = std::min<int64_t>(row.vocab_size - i, kVecWidth);
        const uint32_t valid = lanes_left == kVecWidth ? ~0u : (1u << lanes_left) - 1u;
        uint32_t found = mask_ge(vec_load(row.logits + i, lanes_left), wanted) & valid;
        for (; found != 0; found &= found - 1) {
            const int64_t id = i + __builtin_ctz(found);
            kept.push_back({row.logits[id], 0.0f, id});
        }
    }
}

// Drops every candidate after `last` in the order of `precedes`; the rest stay by ascending id.
void keep_until(std::vector<Candidate>& kept, const Candidate& last) {
    const auto is_dropped = [last](const Candidate& c) { return precedes(last, c); };
    kept.erase(std::remove_if(kept.begin(), kept.end(), is_dropped), kept.end());
}

double total_weight(const std::vector<Candidate>& kept) {
    double total = 0.0;
    for (const Candidate& c : kept) total += c.weight;
    return total;
}

// The last candidate of the shortest prefix that weighs at least `goal`: a quickselect that goes by weight.
Candidate select_by_weight(std::vector<Candidate>& items, double goal) {
    constexpr std::ptrdiff_t kSmall = 32;
    auto begin = items.begin(), end = items.end();
    double before = 0.0;
    while (end - begin > kSmall) {
        Candidate pivot = begin[(end - begin) / 2], first = *begin, last = end[-1];
        if (precedes(pivot, first)) std::swap(pivot, first);
        if (precedes(last, pivot)) pivot = precedes(last, first) ? first : last;
        const auto middle = std::partition(begin, end, [pivot](const Candidate& c) { return !precedes(pivot, c); });
        double weight = 0.0;
        for (auto it = begin; it != middle; ++it) weight += it->weight;
        if (before + weight >= goal) {
            end = middle;  // shrinks: the median of three is not the last in order
        } else {
            before += weight;
            begin = middle;
        }
    }
    std::sort(begin, end, precedes);
    for (auto it = begin; it != end; ++it) {
        before += it->weight;
        if (before >= goal) return *it;
    }
    return items.empty() ? Candidate{} : *std::max_element(items.begin(), items.end(), precedes);
}

int64_t sample_filtered(const Row& row, Scratch& scratch) {
    std::vector<Candidate>& kept = scratch.kept;
    const Bound bound = find_bound(row, scratch);
    collect(row, bound.logit, kept);
    if (row.top_k > 0 && static_cast<int64_t>(kept.size()) > row.top_k) {
        scratch.ordered = kept;
        const auto kth = scratch.ordered.begin() + (row.top_k - 1);
        std::nth_element(scratch.ordered.begin(), kth, scratch.ordered.end(), precedes);
        keep_until(kept, *kth);
    }
    for (Candidate& c : kept) c.weight = static_cast<float>(std::exp((c.logit - row.maximum) / row.temperature));
    if (row.top_p < 1.0) {
        scratch.ordered = kept;
        const double total = bound.total > 0.0 ? bound.total : total_weight(kept);
        keep_until(kept, select_by_weight(scratch.ordered, row.top_p * total));
    }
    const double target = row.uniform * total_weight(kept);
    double before = 0.0;
    int64_t last = kept.front().id;
    for (const Candidate& c : kept) {
        if (c.weight == 0.0f) continue;
        last = c.id;
        before += c.weight;
        if (before > target) break;
    }
    return last;
}

int64_t sample_row(const SamplingArguments& a, int64_t index, Scratch& scratch) {
    const float* logits = a.logits + index * a.stride;
    const float maximum = span_maximum(logits, a.vocab_size);
    const bool is_greedy = a.temperature[index] < kNearZeroTemperature;
    if (is_greedy || !std::isfinite(maximum)) return find_first(logits, a.vocab_size, maximum);
    const int64_t k = a.top_k[index];
    const Row row{logits,           a.vocab_size,   maximum,          a.temperature[index],
                  a.min_p[index],   a.top_p[index], a.uniform[index], k >= 1 && k < a.vocab_size ? k : 0};
    if (row.top_k == 0 && row.top_p >= 1.0 && row.min_p <= 0.0) return sample_unfiltered(row, scratch);
    return sample_filtered(row, scratch);
}

}  // namespace
}  // namespace quire

QUIRE_EXPORT void quire_sample_tokens(const quire::SamplingArguments* arguments) {
    const quire::SamplingArguments& a = *arguments;
#pragma omp parallel for schedule(dynamic, 1) if (a.num_rows > 1)
    for (int64_t row = 0; row < a.num_rows; ++row) {
        static thread_local quire::Scratch scratch;
        a.out[row] = quire::sample_row(a, row, scratch);
    }
}
