/*
 * The loop over the punches of a batch. When the kernel frees pages, it evicts the program's data
 * from the CPU's caches. A loop in Python must load much data again before its next punch; this loop
 * loads little.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>

/*
 * Drop the memory behind `count` ranges of a file; offsets and lengths are in bytes. Before each
 * range, compare `closed_times`, which another thread may change, with `permit`: if they differ,
 * return -1. Stop at the first range that fails. Return its errno, or 0 if none failed.
 */
int punch_while_permitted(int fd, const int64_t *offsets, const int64_t *lengths, size_t count,
			  const int64_t *closed_times, int64_t permit)
{
	for (size_t i = 0; i < count; i++) {
		if (__atomic_load_n(closed_times, __ATOMIC_RELAXED) != permit)
			return -1;
		if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offsets[i], lengths[i]))
			return errno;
	}
	return 0;
}
