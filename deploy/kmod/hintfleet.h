/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * What the guest agent sees of the hintfleet module: /dev/hintfleet.
 *
 * The kernel's page reporting isolates up to HINTFLEET_CAPACITY free chunks and
 * hands them to the module. read() gives them to the agent as one batch; they
 * stay isolated until HINTFLEET_IOC_ACK, however often the agent dies between.
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

/* This batch was read through an earlier open of the device: release it only
 * after the host said that no earlier batch can run any more. */
#define HINTFLEET_BATCH_STILL_ISOLATED (1U << 0)

/* read() returns one whole batch; reading it again returns the same one. */
struct hintfleet_batch {
	__u64 seq;
	__u32 range_count;
	__u32 flags;
	struct hintfleet_range ranges[HINTFLEET_CAPACITY];
};

struct hintfleet_status {
	__u64 batch_count;
	__u64 reported_page_count;
	/* Reporting is scheduled or running: more may come without being asked for. */
	__u32 busy;
	/* Smallest order that is reported. */
	__u32 order;
};

/* Release the batch with this seq; ESTALE if it is not the one that waits. */
#define HINTFLEET_IOC_ACK _IOW('h', 1, __u64)
/* Run the kernel's reporting at once instead of after its delay. Never blocks. */
#define HINTFLEET_IOC_REPORT_NOW _IO('h', 2)
#define HINTFLEET_IOC_STATUS _IOR('h', 3, struct hintfleet_status)

#endif
