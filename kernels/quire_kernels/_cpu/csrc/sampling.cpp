// One token per row of logits: the first maximum, or the inverse of the filtered distribution's cumulative sum.
//
// The order of filters and their ties are those of filter_logits_ref. Every filter keeps a prefix of the tokens by
// descending logit (equal logits: by ascending id), and nothing is sorted whole:
//   * with top_k or min_p, a bound on the logit that provably keeps the whole prefix collects the few tokens that
//     matter in one vector pass, and only they are selected among, exactly;
//   * with top_p alone the prefix may be long, so all tokens' weights are kept, the place where the prefix ends is
//     closed in on by summing what lies above some thresholds at once, and only tokens in between are selected among.
// Sums of probabilities are double, in the order of token ids.
#include "common.h"
#include "vec_math.h"

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
constexpr double kLog2E = 1.4426950408889634;
constexpr float kLeastExponent = -120.0f;  // a token of less than 2^-120 times the highest probability is never drawn
constexpr int64_t kSumBlock = 1024;
constexpr int kNumThresholds = 4;
constexpr int64_t kFewCandidates = 1024;

struct Candidate {
    float logit, weight;  // weight: exp((logit - maximum) / temperature)
    int64_t id;
};

struct Scratch {
    std::vector<Candidate> kept;     // by ascending id
    std::vector<Candidate> ordered;  // a copy to select among
    std::vector<float> maxima, weights;
    std::vector<double> sums;  // of the weights in each kSumBlock tokens
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
    const Vec maximum = vec_set(row.maximum), inverse = vec_set(static_cast<float>(kLog2E / row.temperature));
    Vec sum = vec_zero();
    for (int64_t i = 0; i < count; i += kVecWidth) {
        const int64_t lanes_left = std::min<int64_t>(count - i, kVecWidth);
        const Vec exponent = (vec_load(x + i, lanes_left) - maximum) * inverse;
        const Vec weight = select_less(exponent, vec_set(kLeastExponent), vec_zero(), vec_exp2<5>(exponent));
        const Vec kept = vec_keep(weight, lanes_left, vec_zero());
        sum = sum + kept;
        vec_store(weights + i, kept, lanes_left);
    }
    return reduce_add(sum);
}

QUIRE_INLINE int64_t block_size(const Row& row, int64_t block) {
    return std::min(kSumBlock, row.vocab_size - block * kSumBlock);
}

// Fills scratch.weights and scratch.sums; returns the total.
double weigh_all(const Row& row, Scratch& scratch) {
    const int64_t num_blocks = ceil_div(row.vocab_size, kSumBlock);
    scratch.weights.resize(static_cast<size_t>(row.vocab_size));
    scratch.sums.resize(static_cast<size_t>(num_blocks));
    double total = 0.0;
    for (int64_t block = 0; block < num_blocks; ++block) {
        const int64_t begin = block * kSumBlock;
        const double sum =
            span_weights(row, row.logits + begin, block_size(row, block), scratch.weights.data() + begin);
        scratch.sums[static_cast<size_t>(block)] = sum;
        total += sum;
    }
    return total;
}

// Inverts the cumulative sum of scratch.weights, in blocks of scratch.sums, which add up to `total`.
int64_t draw(const Row& row, double total, const Scratch& scratch) {
    const double target = row.uniform * total;
    const int64_t num_blocks = static_cast<int64_t>(scratch.sums.size());
    double before = 0.0;
    int64_t last = 0;
    for (int64_t block = 0; block < num_blocks; ++block) {
        const double sum = scratch.sums[static_cast<size_t>(block)];
        if (sum == 0.0 || (before + sum <= target && block + 1 < num_blocks)) {
            before += sum;
            if (sum > 0.0) last = (block + 1) * kSumBlock - 1;
            continue;
        }
        for (int64_t id = block * kSumBlock; id < block * kSumBlock + block_size(row, block); ++id) {
            const float weight = scratch.weights[static_cast<size_t>(id)];
            if (weight == 0.0f) continue;
            last = id;
            before += weight;
            if (before > target) return last;
        }
    }
    while (scratch.weights[static_cast<size_t>(last)] == 0.0f) --last;
    return last;
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

// Collects the tokens whose weight lies in [low, high).
void collect_between(const Row& row, float low, float high, Scratch& scratch) {
    scratch.ordered.clear();
    const Vec lowest = vec_set(low), limit = vec_set(high);
    for (int64_t i = 0; i < row.vocab_size; i += kVecWidth) {
        const int64_t count = std::min<int64_t>(row.vocab_size - i, kVecWidth);
        const Vec weights = vec_keep(vec_load(scratch.weights.data() + i, count), count, vec_set(-1.0f));
        for (uint32_t found = mask_ge(weights, lowest) & ~mask_ge(weights, limit); found != 0; found &= found - 1) {
            const int64_t id = i + __builtin_ctz(found);
            scratch.ordered.push_back({row.logits[id], scratch.weights[static_cast<size_t>(id)], id});
        }
    }
}

struct Above {
    double mass[kNumThresholds];
    int64_t count[kNumThresholds];
};

// What weighs at least each of the thresholds.
Above sum_above(const Row& row, const float* thresholds, const Scratch& scratch) {
    Above above{};
    for (int64_t begin = 0; begin < row.vocab_size; begin += kSumBlock) {
        const int64_t end = std::min(begin + kSumBlock, row.vocab_size);
        Vec sums[kNumThresholds];
        for (Vec& sum : sums) sum = vec_zero();
        for (int64_t i = begin; i < end; i += kVecWidth) {
            const Vec weights = vec_load(scratch.weights.data() + i, std::min<int64_t>(end - i, kVecWidth));
#pragma GCC unroll 4
            for (int k = 0; k < kNumThresholds; ++k) {
                const Vec threshold = vec_set(thresholds[k]);
                sums[k] = sums[k] + select_less(weights, threshold, vec_zero(), weights);
                above.count[k] += __builtin_popcount(mask_ge(weights, threshold));
            }
        }
        for (int k = 0; k < kNumThresholds; ++k) above.mass[k] += reduce_add(sums[k]);
    }
    return above;
}

// The last token of the shortest prefix that weighs `goal`, of all tokens, which weigh `total`.
Candidate find_last_by_weight(const Row& row, double goal, double total, Scratch& scratch) {
    // What is below (total - goal) / vocab_size weighs less than total - goal together. Halved against rounding.
    const double least = 0.5 * (total - goal) / static_cast<double>(row.vocab_size);
    double low = std::max<double>(std::log2(least), kLeastExponent), high = 1.0;
    double mass_above = 0.0;  // of weights from 2^high
    int64_t num_above = 0, num_from_low = row.vocab_size;
    while (num_from_low - num_above > kFewCandidates && high - low > 1e-6) {
        float thresholds[kNumThresholds];
        const double step = (high - low) / (kNumThresholds + 1), begin = low;
        for (int k = 0; k < kNumThresholds; ++k) thresholds[k] = std::exp2(static_cast<float>(begin + step * (k + 1)));
        const Above above = sum_above(row, thresholds, scratch);
        for (int k = 0; k < kNumThresholds; ++k) {
            if (above.mass[k] >= goal) {
                low = begin + step * (k + 1);
                num_from_low = above.count[k];
            } else {
                high = begin + step * (k + 1);
                mass_above = above.mass[k];
                num_above = above.count[k];
                break;
            }
        }
    }
    collect_between(row, std::exp2(static_cast<float>(low)), std::exp2(static_cast<float>(high)), scratch);
    return select_by_weight(scratch.ordered, goal - mass_above);
}

// Makes the weights of all tokens after `last` zero; returns the new total.
double drop_after(const Row& row, const Candidate& last, Scratch& scratch) {
    double total = 0.0;
    const Vec least = vec_set(last.logit);
    for (size_t block = 0; block < scratch.sums.size(); ++block) {
        const int64_t begin = static_cast<int64_t>(block) * kSumBlock;
        const int64_t end = std::min(begin + kSumBlock, row.vocab_size);
        Vec sum = vec_zero();
        for (int64_t i = begin; i < end; i += kVecWidth) {
            const int64_t count = std::min<int64_t>(end - i, kVecWidth);
            float* weights = scratch.weights.data() + i;
            const Vec logits = vec_load(row.logits + i, count), old = vec_load(weights, count);
            const Vec zero = vec_zero();
            Vec kept = i > last.id ? select_less(least, logits, old, zero) : select_less(logits, least, zero, old);
            vec_store(weights, kept, count);
            if (i <= last.id && last.id < i + count) {  // equal logits on both sides of it
                for (int64_t id = last.id + 1; id < i + count; ++id) {
                    if (row.logits[id] == last.logit) scratch.weights[static_cast<size_t>(id)] = 0.0f;
                }
                kept = vec_load(weights, count);
            }
            sum = sum + kept;
        }
        scratch.sums[block] = reduce_add(sum);
        total += scratch.sums[block];
    }
    return total;
}

// With no filter, or with top_p alone.
int64_t sample_among_all(const Row& row, Scratch& scratch) {
    double total = weigh_all(row, scratch);
    if (row.top_p < 1.0) {
        total = drop_after(row, find_last_by_weight(row, row.top_p * total, total, scratch), scratch);
    }
    return draw(row, total, scratch);
}

// A logit such that every token that top_k and min_p keep has at least it.
float find_bound(const Row& row, Scratch& scratch) {
    double bound = -kInfinity;
    if (row.min_p > 0.0) bound = row.maximum + row.temperature * std::log(std::min(row.min_p, 1.0));
    const int64_t span = row.top_k * 256 <= row.vocab_size ? 64 : 16;
    const int64_t num_spans = ceil_div(row.vocab_size, span);
    if (row.top_k > 0 && row.top_k <= num_spans) {
        // At least k tokens reach the k-th largest of the spans' maxima.
        scratch.maxima.resize(static_cast<size_t>(num_spans));
        for (int64_t i = 0; i < num_spans; ++i) {
            const float* logits = row.logits + i * span;
            scratch.maxima[static_cast<size_t>(i)] = span_maximum(logits, std::min(span, row.vocab_size - i * span));
        }
        const auto kth = scratch.maxima.begin() + (row.top_k - 1);
        std::nth_element(scratch.maxima.begin(), kth, scratch.maxima.end(), std::greater<float>());
        bound = std::max<double>(bound, *kth);
    }
    return static_cast<float>(bound);
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

// With top_k or min_p, and maybe top_p.
int64_t sample_among_few(const Row& row, Scratch& scratch) {
    std::vector<Candidate>& kept = scratch.kept;
    collect(row, find_bound(row, scratch), kept);
    if (row.top_k > 0 && static_cast<int64_t>(kept.size()) > row.top_k) {
        scratch.ordered = kept;
        const auto kth = scratch.ordered.begin() + (row.top_k - 1);
        std::nth_element(scratch.ordered.begin(), kth, scratch.ordered.end(), precedes);
        keep_until(kept, *kth);
    }
    for (Candidate& c : kept) c.weight = static_cast<float>(std::exp((c.logit - row.maximum) / row.temperature));
    if (row.top_p < 1.0) {
        scratch.ordered = kept;
        keep_until(kept, select_by_weight(scratch.ordered, row.top_p * total_weight(kept)));
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

__attribute__((noinline)) int64_t sample_row(const SamplingArguments& a, int64_t index, Scratch& scratch) {
    const float* logits = a.logits + index * a.stride;
    const float maximum = span_maximum(logits, a.vocab_size);
    const bool is_greedy = a.temperature[index] < kNearZeroTemperature;
    if (is_greedy || !std::isfinite(maximum)) return find_first(logits, a.vocab_size, maximum);
    const int64_t k = a.top_k[index];
    const Row row{logits,           a.vocab_size,   maximum,          a.temperature[index],
                  a.min_p[index],   a.top_p[index], a.uniform[index], k >= 1 && k < a.vocab_size ? k : 0};
    return row.top_k == 0 && row.min_p <= 0.0 ? sample_among_all(row, scratch) : sample_among_few(row, scratch);
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
