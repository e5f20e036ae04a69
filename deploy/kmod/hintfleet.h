/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * What the guest agent sees of the hintfleet module: /dev/hintfleet.
 *
 * The kernel's page reporting isolates up to HINTFLEET_CAPACITY free chunks and
 * hands them to the module. read() gives them to the agent as one batch; they
 * stay isolated until HINTFLEET_IOC_ACK or HINTFLEET_IOC_RETURN, however often the
 * agent dies between.
 */
#ifndef HINTFLEET_H
#define HINTFLEET_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define HINTFLEET_CAPACITY 32

struct hintfleet_range {
	__u64 pfn;
	__u64 page_count;
};

/*
 * This batch was read through an earlier open of the device: release it only
 * after the host said that no earlier batch can run any more.
 */
#define HINTFLEET_BATCH_STILL_ISOLATED (1U << 0)

/*
 * read() returns one whole batch; reading it again returns the same one. poll()
 * says readable once per batch and open: until it was read.
 *
 * A batch that nobody has read is taken back when the device is closed, or
 * after a second: an agent that does not read must not cost the guest memory.
 */
struct hintfleet_batch {
	__u64 seq;
	__u32 range_count;
	__u32 flags;
	struct hintfleet_range ranges[HINTFLEET_CAPACITY];
};

/* A pass over the free lists is queued or running (it may wait for an ACK). */
#define HINTFLEET_RUNNING (1U << 0)
/*
 * There are free chunks that no pass has seen. The kernel will look at them
 * after its delay of 2 s, or only after HINTFLEET_IOC_REPORT_NOW where a batch
 * was refused or taken back.
 */
#define HINTFLEET_MORE (1U << 1)

struct hintfleet_status {
	/* Acknowledged since the module was loaded. */
	__u64 batch_count;
	__u64 page_count;
	/* HINTFLEET_RUNNING, HINTFLEET_MORE */
	__u32 state;
	/*
	 * The smallest order that the module asked to have reported. A kernel
	 * that was told another one before (by an earlier driver, or by
	 * page_reporting.page_reporting_order) keeps to that.
	 */
	__u32 order;
};

/* Release the batch with this seq; ESTALE if it is not the one that waits. */
#define HINTFLEET_IOC_ACK _IOW('h', 1, __u64)
/*
 * Begin a pass at once instead of after the kernel's delay of 2 s; one that runs
 * is followed by another. Never blocks. However a pass began, if it found
 * something it is followed by another at once, until one finds nothing.
 */
#define HINTFLEET_IOC_REPORT_NOW _IO('h', 2)
#define HINTFLEET_IOC_STATUS _IOR('h', 3, struct hintfleet_status)
/*
 * Release the batch with this seq as not reported: the host did not act on it, so a
 * later pass will bring its chunks again. ESTALE as for HINTFLEET_IOC_ACK.
 */
#define HINTFLEET_IOC_RETURN _IOW('h', 4, __u64)
/*
 * Not 0: begin no pass, and refuse what one that runs reports, so that nothing is
 * isolated, until this is called with 0 or the device is closed. A chunk that is
 * freed may have the kernel plan another pass, so call this again now and then. A
 * batch that waits is not affected. What was refused comes again after
 * HINTFLEET_IOC_REPORT_NOW. The agent calls this while it holds free memory back.
 */
#define HINTFLEET_IOC_REFUSE _IOW('h', 5, __u32)

#endif
