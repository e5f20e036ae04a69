// SPDX-License-Identifier: GPL-2.0-only
/*
 * Free page hinting with acknowledgement.
 *
 * The kernel's free page reporting (mm/page_reporting.c) tracks which free
 * chunks are new, isolates up to 32 of them and calls report(); when report()
 * returns 0 it marks them reported and gives them back. Here report() hands the
 * chunks to a user space agent through /dev/hintfleet and sleeps until the
 * agent says that the host has answered. See hintfleet.h for the interface.
 *
 * What holds at any time:
 * - A batch that the agent has read stays isolated until it acknowledges or
 *   returns it.
 *   Neither close() nor rmmod ends it: the host may be acting on it.
 * - A batch that nobody has read is given back unreported when the agent goes
 *   away or does not read it for a second. So nothing is isolated for long on
 *   behalf of an agent that is absent or stuck.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/page_reporting.h>
#include <linux/poll.h>
#include <linux/scatterlist.h>
#include <linux/uaccess.h>
#include <linux/version.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include "hintfleet.h"

#define UNREAD_TIMEOUT HZ

static unsigned int order;
module_param(order, uint, 0444);
MODULE_PARM_DESC(order, "Smallest order that is reported (default: pageblock_order)");

static int hintfleet_report(struct page_reporting_dev_info *dev,
			    struct scatterlist *sgl, unsigned int nents);

static struct page_reporting_dev_info reporting = {
	.report = hintfleet_report,
	/* In a kernel that has this name, 0 means order 0, not pageblock_order. */
#ifdef PAGE_REPORTING_ORDER_UNSPECIFIED
	.order = PAGE_REPORTING_ORDER_UNSPECIFIED,
#endif
};

/*
 * One batch at most: the kernel calls report() from one work item, which is
 * never run twice at once, and the next call needs this one's return.
 *
 * The lock guards all members. The two conditions that are waited for are read
 * without it by the waiters (READ_ONCE); whoever wakes up takes the lock before
 * acting on what it saw, which also orders it after the writer's section.
 */
static struct {
	struct mutex lock;
	wait_queue_head_t published;
	wait_queue_head_t answered;
	struct hintfleet_batch batch;
	/* The device is open. */
	bool agent;
	/* report() sleeps on the batch; cleared with result set. */
	bool waiting;
	/* The batch was read: only the agent may end it (ACK, RETURN). */
	bool taken;
	/* It was read through the present open. */
	bool seen;
	/* The agent wants nothing now. */
	bool refuse;
	/* Free chunks were refused since the last REPORT_NOW. */
	bool refused;
	int result;
	u64 batch_count;
	u64 page_count;
} hf = {
	.lock = __MUTEX_INITIALIZER(hf.lock),
	.published = __WAIT_QUEUE_HEAD_INITIALIZER(hf.published),
	.answered = __WAIT_QUEUE_HEAD_INITIALIZER(hf.answered),
};

static void fill_batch(struct scatterlist *sgl, unsigned int nents)
{
	struct scatterlist *sg;
	unsigned int i;

	/* A shorter batch must not show ranges of the one before. */
	memset(hf.batch.ranges, 0, sizeof(hf.batch.ranges));
	for_each_sg(sgl, sg, nents, i) {
		hf.batch.ranges[i].pfn = page_to_pfn(sg_page(sg));
		hf.batch.ranges[i].page_count = sg->length >> PAGE_SHIFT;
	}
	hf.batch.range_count = nents;
	hf.batch.flags = 0;
	hf.batch.seq++;
}

static int publish(struct scatterlist *sgl, unsigned int nents)
{
	int err = 0;

	BUILD_BUG_ON(PAGE_REPORTING_CAPACITY > HINTFLEET_CAPACITY);

	mutex_lock(&hf.lock);
	/* If a batch waits, this is a second pass: its batch would replace that one. */
	if (hf.agent && !hf.refuse && !WARN_ON_ONCE(hf.waiting)) {
		fill_batch(sgl, nents);
		hf.taken = false;
		hf.seen = false;
		WRITE_ONCE(hf.waiting, true);
		wake_up_interruptible(&hf.published);
	} else {
		hf.refused = true;
		err = -EBUSY;
	}
	mutex_unlock(&hf.lock);
	return err;
}

/*
 * Have the kernel look at its free lists at once, not after its delay of 2 s.
 *
 * The work item is the kernel's own, made by page_reporting_register(). It sets
 * its state when it starts, so running it early is no different from its timer
 * firing. If it runs now it is run again afterwards, and its own request for a
 * delayed run finds it queued.
 *
 * It must be queued on the workqueue that the kernel uses for it, and that is one or
 * another: system_wq; system_percpu_wq since 6.18 (a2be943b46b4 ("workqueue: replace
 * use of system_wq with system_percpu_wq")). The timer of the work item names it, since
 * page_reporting_register(). A work item that is queued on two workqueues can run
 * twice at once, on two CPUs (__queue_work()).
 */
static void start_pass(void)
{
	mod_delayed_work(reporting.work.wq, &reporting.work, 0);
}

/* Let report() return. Called with the lock held and a batch waiting. */
static void answer(int result)
{
	lockdep_assert_held(&hf.lock);
	hf.result = result;
	WRITE_ONCE(hf.waiting, false);
	wake_up(&hf.answered);
}

/* Give the chunks back unreported, if nobody can have told the host of them. */
static void take_back(void)
{
	lockdep_assert_held(&hf.lock);
	if (!hf.waiting || hf.taken)
		return;
	hf.refused = true;
	answer(-EAGAIN);
}

static int await_answer(void)
{
	int result;

	/* TASK_IDLE: however long the host takes, this is no hung task, no load. */
	if (!wait_event_idle_timeout(hf.answered, !READ_ONCE(hf.waiting),
				     UNREAD_TIMEOUT)) {
		mutex_lock(&hf.lock);
		take_back();
		mutex_unlock(&hf.lock);
	}
	wait_event_idle(hf.answered, !READ_ONCE(hf.waiting));

	mutex_lock(&hf.lock);
	result = hf.result;
	mutex_unlock(&hf.lock);
	return result;
}

static int hintfleet_report(struct page_reporting_dev_info *dev,
			    struct scatterlist *sgl, unsigned int nents)
{
	int err;

	/*
	 * rmmod would sleep in page_reporting_unregister() until the batch is
	 * acknowledged, with the device already out of reach: so it is refused
	 * while one waits. After module_put() this may still run, but exit waits
	 * for the work item that it runs in.
	 */
	if (!try_module_get(THIS_MODULE))
		return -ENODEV;
	err = publish(sgl, nents);
	if (!err)
		err = await_answer();
	/*
	 * A pass stops after a sixteenth of each list, and does not look back at
	 * chunks that merged when they were given back. So one that found
	 * something is followed by another, until one finds nothing.
	 */
	if (!err)
		start_pass();
	module_put(THIS_MODULE);
	return err;
}

static int hintfleet_open(struct inode *inode, struct file *file)
{
	int err = 0;

	mutex_lock(&hf.lock);
	if (hf.agent) {
		err = -EBUSY;
	} else {
		hf.agent = true;
		hf.seen = false;
		if (hf.waiting)	/* and taken: else release would have ended it */
			hf.batch.flags |= HINTFLEET_BATCH_STILL_ISOLATED;
	}
	mutex_unlock(&hf.lock);
	return err ?: stream_open(inode, file);
}

static int hintfleet_release(struct inode *inode, struct file *file)
{
	mutex_lock(&hf.lock);
	hf.agent = false;
	hf.refuse = false;
	take_back();
	mutex_unlock(&hf.lock);
	return 0;
}

static ssize_t hintfleet_read(struct file *file, char __user *buf, size_t count,
			      loff_t *ppos)
{
	ssize_t size = sizeof(hf.batch);
	int err;

	if (count < size)
		return -EINVAL;

	mutex_lock(&hf.lock);
	while (!hf.waiting) {
		mutex_unlock(&hf.lock);
		if (file->f_flags & O_NONBLOCK)
			return -EAGAIN;
		err = wait_event_interruptible(hf.published,
					       READ_ONCE(hf.waiting));
		if (err)
			return err;
		mutex_lock(&hf.lock);
	}
	/* Before the copy: one that faults may have shown some ranges. */
	hf.taken = true;
	hf.seen = true;
	if (copy_to_user(buf, &hf.batch, size))
		size = -EFAULT;
	mutex_unlock(&hf.lock);
	return size;
}

static __poll_t hintfleet_poll(struct file *file, poll_table *wait)
{
	__poll_t mask = 0;

	poll_wait(file, &hf.published, wait);
	mutex_lock(&hf.lock);
	if (hf.waiting && !hf.seen)
		mask = EPOLLIN | EPOLLRDNORM;
	mutex_unlock(&hf.lock);
	return mask;
}

static void count_batch(void)
{
	unsigned int i;

	lockdep_assert_held(&hf.lock);
	for (i = 0; i < hf.batch.range_count; i++)
		hf.page_count += hf.batch.ranges[i].page_count;
	hf.batch_count++;
}

/* The host has dealt with the batch, or (not reported) has not and will not. */
static long release_batch(u64 seq, bool reported)
{
	long err = 0;

	mutex_lock(&hf.lock);
	if (!hf.waiting || !hf.taken || hf.batch.seq != seq) {
		err = -ESTALE;
	} else if (reported) {
		count_batch();
		answer(0);
	} else {
		hf.refused = true;
		answer(-EAGAIN);
	}
	mutex_unlock(&hf.lock);
	return err;
}

static void report_now(void)
{
	mutex_lock(&hf.lock);
	hf.refused = false;
	mutex_unlock(&hf.lock);
	start_pass();
}

static void set_refuse(bool refuse)
{
	mutex_lock(&hf.lock);
	hf.refuse = refuse;
	/*
	 * The kernel gives refused chunks back to the end of its free lists, so a
	 * pass for nothing would have the guest use them last. One that is planned
	 * and not begun is cancelled. Its state stays "requested", so that the next
	 * free chunk plans none; report_now() begins it.
	 */
	if (refuse && cancel_delayed_work(&reporting.work))
		hf.refused = true;
	mutex_unlock(&hf.lock);
}

static u32 reporting_state(void)
{
	bool delayed = timer_pending(&reporting.work.timer);
	unsigned int busy = work_busy(&reporting.work.work);
	u32 state = 0;

	/*
	 * Pending without a timer is queued. The timer was looked at first: if
	 * it fires in between, the pass is missed once and seen as MORE instead.
	 */
	if ((busy & WORK_BUSY_RUNNING) || ((busy & WORK_BUSY_PENDING) && !delayed))
		state |= HINTFLEET_RUNNING;
	if (delayed || hf.refused)
		state |= HINTFLEET_MORE;
	return state;
}

static long copy_status(struct hintfleet_status __user *to)
{
	struct hintfleet_status status = {
		.order = order ?: pageblock_order,
	};

	mutex_lock(&hf.lock);
	status.batch_count = hf.batch_count;
	status.page_count = hf.page_count;
	status.state = reporting_state();
	mutex_unlock(&hf.lock);
	return copy_to_user(to, &status, sizeof(status)) ? -EFAULT : 0;
}

static long hintfleet_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	void __user *user = (void __user *)arg;
	u32 refuse;
	u64 seq;

	switch (cmd) {
	case HINTFLEET_IOC_ACK:
	case HINTFLEET_IOC_RETURN:
		if (copy_from_user(&seq, user, sizeof(seq)))
			return -EFAULT;
		return release_batch(seq, cmd == HINTFLEET_IOC_ACK);
	case HINTFLEET_IOC_REPORT_NOW:
		report_now();
		return 0;
	case HINTFLEET_IOC_REFUSE:
		if (copy_from_user(&refuse, user, sizeof(refuse)))
			return -EFAULT;
		set_refuse(refuse);
		return 0;
	case HINTFLEET_IOC_STATUS:
		return copy_status(user);
	default:
		return -ENOTTY;
	}
}

static const struct file_operations hintfleet_fops = {
	.owner = THIS_MODULE,
	.open = hintfleet_open,
	.release = hintfleet_release,
	.read = hintfleet_read,
	.poll = hintfleet_poll,
	.unlocked_ioctl = hintfleet_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

static struct miscdevice hintfleet_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "hintfleet",
	.fops = &hintfleet_fops,
	.mode = 0600,
};

static int set_order(void)
{
	if (!order)
		return 0;
	/* 9f849c6f9572 ("mm/page_reporting: allow driver to specify reporting order") */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(5, 14, 0)
	reporting.order = order;
	return 0;
#else
	pr_err("this kernel reports pageblock_order only; order= needs 5.14\n");
	return -EINVAL;
#endif
}

/*
 * With page_poison=1 a free page holds a pattern that is checked when the page is
 * allocated; after a reclaim it holds zeros. The balloon device tells its host of
 * the pattern, or does not report (virtballoon_validate()); we have no such host.
 */
static int check_poisoning(void)
{
	/* 8db26a3d4735 ("mm, page_poison: use static key more efficiently") */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(5, 11, 0)
	if (!page_poisoning_enabled_static())
		return 0;
#else
	if (!page_poisoning_enabled())
		return 0;
#endif
	pr_err("page poisoning is on, and a reclaimed page would look corrupted: boot with page_poison=0\n");
	return -EOPNOTSUPP;
}

static int __init hintfleet_init(void)
{
	int err = check_poisoning() ?: set_order();

	if (err)
		return err;
	/* Registered first: without an open device, report() only refuses. */
	err = page_reporting_register(&reporting);
	if (err == -EBUSY)
		pr_err("free page reporting is in use already: start this guest with the balloon's free-page-reporting=off\n");
	if (err)
		return err;
	err = misc_register(&hintfleet_device);
	if (err)
		page_reporting_unregister(&reporting);
	return err;
}

static void __exit hintfleet_exit(void)
{
	misc_deregister(&hintfleet_device);
	page_reporting_unregister(&reporting);
}

module_init(hintfleet_init);
module_exit(hintfleet_exit);

MODULE_DESCRIPTION("Free page hinting with acknowledgement, for the hintfleet guest agent");
MODULE_LICENSE("GPL");
