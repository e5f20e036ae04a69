/*
 * The loop of a batch's punches. Each punch leaves the caches to the kernel's freeing of
 * pages; what an interpreter needs to come to the next one is much to fetch again, and this
 * is little.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>

/* Drop `count` ranges, in bytes; 0, or the errno of the first that failed, at which it ends. */
int punch_all(int fd, const int64_t *offsets, const int64_t *lengths, size_t count)
{
	for (size_t i = 0; i < count; i++)
		if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offsets[i], lengths[i]))
			return errno;
	return 0;
}
