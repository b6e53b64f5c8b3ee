// Start-up: the ABI version, the library's own name, and the kernel's permission to use AMX tiles.
#include "common.h"

#include <cerrno>
#include <sys/syscall.h>
#include <unistd.h>

// Comes from variants.py; native.py refuses a library with another version.
QUIRE_EXPORT int64_t quire_abi_version() { return QUIRE_ABI_VERSION; }

// Makes the instruction set usable in this process. Returns 0, or the errno with which the kernel refused. Linux hands
// out the 8 KiB AMX tile state only to processes that ask for it (arch_prctl(2)); all threads share the grant.
QUIRE_EXPORT int64_t quire_init() {
#if defined(QUIRE_HAS_AMX)
    constexpr long kArchReqXcompPerm = 0x1023;
    constexpr long kXfeatureXtiledata = 18;
    if (syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) != 0) return errno;
#endif
    return 0;
}

// The size of a team that a parallel region gets now: what torch.set_num_threads last said.
QUIRE_EXPORT int64_t quire_num_threads() { return omp_get_max_threads(); }
