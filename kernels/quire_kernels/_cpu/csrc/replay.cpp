// Runs a recorded sequence of kernel calls with nothing between them (see recording.py).
//
// A kernel takes only integers and pointers, at most kMaxArguments of them. The C calling conventions of 64-bit Linux
// (System V on x86-64, AAPCS64 on Arm) put these in the same places however many follow, so one prototype calls them all;
// a kernel does not look at the arguments that it does not have.

#include "common.h"

namespace {

constexpr int kMaxArguments = 12;

struct Call {  // CALL_FIELDS in recording.py
    int64_t function;
    int64_t returns_status;
    int64_t arguments[kMaxArguments];
};

using Kernel = int64_t (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                           int64_t, int64_t);

}  // namespace

// Returns 0, or one more than the index of the first call that failed; nothing after it was run.
QUIRE_EXPORT int64_t quire_replay(const Call* calls, int64_t num_calls) {
    for (int64_t index = 0; index < num_calls; ++index) {
        const Call& call = calls[index];
        const int64_t* a = call.arguments;
        const int64_t status = reinterpret_cast<Kernel>(call.function)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8],
                                                                       a[9], a[10], a[11]);
        if (call.returns_status != 0 && status != 0) return index + 1;
    }
    return 0;
}
