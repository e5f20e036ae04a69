/*
 * The loop over a batch's punches. Freeing pages in the kernel evicts the program's data from the
 * CPU's caches. An interpreter has much to load again before its next punch; this loop has little.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>

/* Drop `count` ranges, in bytes. Return 0, or the errno of the first that failed and stop there. */
int punch_all(int fd, const int64_t *offsets, const int64_t *lengths, size_t count)
{
	for (size_t i = 0; i < count; i++)
		if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offsets[i], lengths[i]))
			return errno;
	return 0;
}
