/*
 * The session protocol: one guest, its agents, its host agent, the link between them.
 *
 * What must hold: the host never drops a chunk that the guest may be using. The words
 * and the invariants I1, I2, I4 and I5 are those of ARCHITECTURE.md. The code is
 * guest_agent/hinting.py (Agent), and host_agent/session/gate.py with guest_sessions.py,
 * which carries out its instructions, and door/door.py with memory/fence.py (Host).
 * tests/model/test_session_model.py runs this.
 *
 * There are FAULTS faults in all, at any point: the link is cut, an agent dies, the
 * host agent dies, the guest is destroyed, QEMU stops it. A guest that was stopped goes on as
 * it was, or is reset and keeps its RAM, or is put back to an older state. A message that was sent before a cut may still
 * arrive, at any later time, or be lost. Messages of one stream keep their order;
 * messages of two streams do not.
 *
 * What is left out, and why that hides no error:
 * - The contents of chunks. A chunk that is not isolated counts as in use with data in
 *   it, because the guest's allocator may give away a free chunk at any time.
 * - Time. A batch may be skipped as stale whenever its turn comes, and a punch may take
 *   any time. So nothing here is safe only because it is fast.
 * - Policies, limits, settling, books: they decide which chunks are hinted and when, and
 *   any chunk may be hinted here at any time.
 * - More than two chunks. All steps treat the chunks of a set alike, except for the
 *   punch, which drops one after the other. With two chunks, a set can be half dropped.
 *
 * The bounds below give two million states. If you change the protocol, also run
 * -DFAULTS=3 -DBATCHES=2: four million states, one minute, no error.
 *
 * MUTATION=n makes the n-th mistake below. Each must end in a chunk that is dropped while
 * it may be in use, so under a mutation only that is asserted, and no invariant.
 */

#ifndef MUTATION
#define MUTATION 0
#endif
#define RELEASES_BEFORE_ACK		(MUTATION == 1)
#define WELCOMES_WHILE_A_BATCH_RUNS	(MUTATION == 2)
#define RESET_KEEPS_THE_RAM		(MUTATION == 3)
#define DEATH_RELEASES			(MUTATION == 4)
#define TAKES_ACKS_OF_OLD_EPOCHS	(MUTATION == 5)
#define WAITING_OUTLIVES_ITS_EPOCH	(MUTATION == 6)
#define TAKES_BATCHES_OF_OLD_SESSIONS	(MUTATION == 7)
#define NEXT_HOST_AGENT_DOES_NOT_WAIT	(MUTATION == 8)
#define AGENTS_SHARE_THE_ISOLATOR	(MUTATION == 9)
#define NEXT_AGENT_RELEASES_AT_ONCE	(MUTATION == 10)
#define ACK_BEFORE_THE_PUNCH		(MUTATION == 11)
#define LOST_LINK_RELEASES		(MUTATION == 12)
#define CLOSES_RAM_UNDER_A_PUNCH	(MUTATION == 13)
#define ANSWERS_BEFORE_THE_PUNCH_IS_OVER (MUTATION == 14)
#define PUNCHES_AFTER_THE_ANSWER	(MUTATION == 15)
#define EPOCH_OUTLIVES_THE_STOP		(MUTATION == 16)
#define GOES_ON_WHEN_THE_DOOR_OPENS	(MUTATION == 17)

#define invariant(p)	assert(MUTATION || (p))

#ifndef FAULTS
#define FAULTS	2
#endif
#ifndef BATCHES
#define BATCHES	3	/* sent in all */
#endif
/* A fault ends a stream; its Hello, received late, can supersede and end another one. */
#define STREAMS	(1 + 2 * FAULTS)
#if FAULTS == 2
#define EACH(event)	:: event(0) :: event(1) :: event(2) :: event(3) :: event(4)
#elif FAULTS == 3
#define EACH(event)	:: event(0) :: event(1) :: event(2) :: event(3) :: event(4) \
			:: event(5) :: event(6)
#endif
#define IN_FLIGHT	2
#define NOBODY	255

mtype = { HELLO, BATCH, WELCOME, ACK };
mtype = { CLOSED, OPEN, GONE };
mtype = { RUNS, ASKS, STOPPED };

byte faults = FAULTS;
byte batches = BATCHES;

/* The guest's kernel, which outlives its agents. A set of chunks is a bit mask. */
byte isolated;
bool isolator_taken;	/* an agent holds it: /dev/hintfleet, or the pool's lock */
bool alive[2];	/* its two agents */
bool reset;		/* the guest was destroyed: nobody uses its RAM */
byte boot;		/* changes when the guest is reset and keeps its RAM */

/* QEMU: the guest runs; or QEMU asks at the memory door to stop it, and waits; or it is stopped. */
mtype qemu = RUNS;

/* The link: a stream has a channel each way. */
chan to_host[STREAMS] = [1 + IN_FLIGHT] of { mtype, byte, byte, byte };	/* epoch, seq, set */
chan to_guest[STREAMS] = [1 + IN_FLIGHT] of { mtype, byte, byte };	/* epoch, seq */
bool cut[STREAMS];	/* over, which each end notices later */
bool connected[STREAMS];	/* its Hello was received */
byte streams;

/* The host agent. */
bool host_up = true;
mtype state = CLOSED;
byte session = NOBODY;
byte epochs;		/* the clock of epochs, which outlives the host agent */
byte epoch;
byte next_epoch;	/* of the session that is not welcomed yet */
chan waiting = [IN_FLIGHT] of { byte, byte, byte };	/* epoch, seq, set */
bool running;
byte running_epoch, running_seq, to_drop;
byte slice;		/* the chunk that a system call is dropping */
bool fence = true;	/* open */
bool permit;		/* of the running batch: a slice of it may begin */
bool ram_open = true;
byte predecessor;	/* what the system call of a dead host agent will still drop */

#define nothing_of_an_earlier_epoch_can_run \
	(!running && !predecessor && empty(waiting))

/* One fallocate: the page cache of this chunk is gone. */
inline drop(chunk)
{
	assert(ram_open);	/* else the descriptor may be another file by now */
	assert((isolated & chunk) || (reset && !RESET_KEEPS_THE_RAM));
}

#define lowest(set)	((set) & -(set))

/* ---------------------------------------------------------------- the guest */

/* QEMU halts the guest before it stops its devices (softmmu/cpus.c: do_vm_stop). */
#define lives	(alive[me] && !reset && qemu == RUNS && my_boot == boot)

inline release(set)
{
	/* I1: chunks that the host may still drop are not given back. */
	invariant(!(running && (to_drop & (set))) && !(predecessor & (set)));
	isolated = isolated & ~(set);
}

inline acknowledged()
{
	if
	:: (e == at_epoch || TAKES_ACKS_OF_OLD_EPOCHS) && in_flight[q % IN_FLIGHT] ->
		if
		:: !RELEASES_BEFORE_ACK -> release(in_flight[q % IN_FLIGHT])
		:: else
		fi;
		in_flight[q % IN_FLIGHT] = 0
	:: else
	fi
}

inline isolate(set)
{
	atomic { lives && open && batches && !(isolated & set) &&
		 !in_flight[(seq + 1) % IN_FLIGHT] ->
		batches--;
		seq++;
		isolated = isolated | set;
		in_flight[seq % IN_FLIGHT] = set;
		/* A stream that is over takes no more messages; the batch is lost. */
		if
		:: nfull(to_host[stream]) -> to_host[stream]!BATCH,at_epoch,seq,set
		:: full(to_host[stream])
		fi;
		if
		:: RELEASES_BEFORE_ACK -> release(set)
		:: else
		fi
	}
}

inline forget_stream()
{
	in_flight[0] = 0;
	in_flight[1] = 0;
	open = false;
	stream = NOBODY
}

proctype Agent(byte me)
{
	byte stream = NOBODY, unfenced, at_epoch, seq, e, q;
	byte in_flight[IN_FLIGHT];
	byte my_boot;
	bool open;

end:	do
	:: atomic { !alive[me] && !reset &&
		    (!isolator_taken || AGENTS_SHARE_THE_ISOLATOR) ->
			alive[me] = true;
			my_boot = boot;
			isolator_taken = true;
			/* I4: what an earlier agent left isolated waits for a Welcome. */
			unfenced = isolated;
			if
			:: NEXT_AGENT_RELEASES_AT_ONCE -> release(unfenced); unfenced = 0
			:: else
			fi
		}
	:: atomic { lives && stream == NOBODY && streams < STREAMS ->
			stream = streams;
			streams++;
			to_host[stream]!HELLO,0,0,0
		}
	:: atomic { lives && stream != NOBODY && to_guest[stream]?[WELCOME,e,q] ->
			to_guest[stream]?WELCOME,at_epoch,_;
			release(unfenced);
			unfenced = 0;
			seq = 0;
			open = true
		}
	:: atomic { lives && stream != NOBODY && to_guest[stream]?[ACK,e,q] ->
			to_guest[stream]?ACK,e,q;
			acknowledged()
		}
	/* An ack on this agent's earlier stream may still arrive. */
	:: atomic { lives && open && stream > 0 && to_guest[stream - 1]?[ACK,e,q] ->
			to_guest[stream - 1]?ACK,e,q;
			acknowledged()
		}
	:: isolate(1)
	:: isolate(2)
	:: isolate(3)
	:: atomic { lives && stream != NOBODY && cut[stream] ->
			if
			:: LOST_LINK_RELEASES -> release(in_flight[0] | in_flight[1])
			:: else -> unfenced = unfenced | in_flight[0] | in_flight[1]
			fi;
			forget_stream()
		}
	/* The agent dies, by a fault or with its guest. */
	:: atomic { alive[me] && (faults || reset || my_boot != boot) ->
			faults = (reset || my_boot != boot -> faults : faults - 1);
			if
			:: DEATH_RELEASES && my_boot == boot -> release(in_flight[0] | in_flight[1] | unfenced)
			:: else
			fi;
			if
			:: stream != NOBODY -> cut[stream] = true
			:: else
			fi;
			unfenced = 0;
			forget_stream();
			my_boot = 0;
			alive[me] = false;
			isolator_taken = false
		}
	od
}

/* ----------------------------------------------------------------- the host */

/* End the epoch: waiting batches will never run. */
inline close()
{
	state = (state == GONE -> GONE : CLOSED);
	if
	:: WAITING_OUTLIVES_ITS_EPOCH
	:: else -> drain(waiting)
	fi
}

inline drain(channel)
{
	do
	:: nempty(channel) -> channel?_,_,_
	:: empty(channel) -> break
	od
}

inline drain_link(channel)
{
	do
	:: nempty(channel) -> channel?_,_,_,_
	:: empty(channel) -> break
	od
}

/* A stream dies with its host agent, and messages on their way to the host are lost. */
inline die(s)
{
	if
	:: connected[s] -> cut[s] = true; drain_link(to_host[s])
	:: else
	fi
}

/* EndSession: a newer session supersedes this one, or the guest is gone. */
inline end_session()
{
	if
	:: session != NOBODY -> cut[session] = true; session = NOBODY
	:: else
	fi;
	close()
}

inline welcome_if_nothing_runs()
{
	if
	:: state == CLOSED && session != NOBODY && fence &&
	   (!running || WELCOMES_WHILE_A_BATCH_RUNS) ->
		invariant(nothing_of_an_earlier_epoch_can_run);	/* I2 */
		state = OPEN;
		epoch = next_epoch;
		if
		:: nfull(to_guest[session]) -> to_guest[session]!WELCOME,epoch,0
		:: full(to_guest[session])
		fi
	:: else
	fi
}

inline acknowledge()
{
	if
	:: state == OPEN ->
		if
		:: nfull(to_guest[session]) -> to_guest[session]!ACK,q_epoch,q_seq
		:: full(to_guest[session])
		fi
	:: else
	fi
}

inline receive(s)
{
	atomic { host_up && s < streams && nempty(to_host[s]) ->
		if
		:: to_host[s]?HELLO,_,_,_ ->
			connected[s] = true;
			end_session();
			if
			:: state == GONE -> cut[s] = true
			:: else ->
				session = s;
				epochs++;
				next_epoch = epochs;
				welcome_if_nothing_runs()
			fi
		:: to_host[s]?BATCH,q_epoch,q_seq,q_set ->
			if
			:: (s == session && state == OPEN) || TAKES_BATCHES_OF_OLD_SESSIONS ->
				if
				:: nfull(waiting) -> waiting!q_epoch,q_seq,q_set
				:: full(waiting)
				fi
			:: else	/* skipped */
			fi
		fi;
		q_epoch = 0; q_seq = 0; q_set = 0
	}
}

inline leave(s)
{
	atomic { host_up && cut[s] && session == s -> session = NOBODY; close() }
}

/* The guest goes on as it was; or it was reset; or it was put back to a state in which anything
 * was isolated, by an agent of then. */
inline go_on()
{
	qemu = RUNS;
	if
	:: true
	:: boot++; isolated = 0
	:: boot++; isolated = 3
	fi
}

proctype Host()
{
	byte q_epoch, q_seq, q_set, s;

end:	do
	EACH(receive)
	EACH(leave)
	/* A batch's turn: it runs, or is skipped, at least because of its age. */
	:: atomic { host_up && !running && nempty(waiting) ->
			waiting?q_epoch,q_seq,q_set;
			if
			:: q_epoch == epoch || TAKES_BATCHES_OF_OLD_SESSIONS ||
			   WAITING_OUTLIVES_ITS_EPOCH ->
				invariant(state == OPEN);
				running = true;
				permit = fence;
				running_epoch = q_epoch;
				running_seq = q_seq;
				to_drop = q_set;
				if
				:: ACK_BEFORE_THE_PUNCH -> acknowledge()
				:: else
				fi
			:: true -> acknowledge()
			fi;
			q_epoch = 0; q_seq = 0; q_set = 0
		}
	:: atomic { host_up && running && to_drop && !slice &&
		    (permit || PUNCHES_AFTER_THE_ANSWER ||
		     (fence && GOES_ON_WHEN_THE_DOOR_OPENS)) ->
			slice = lowest(to_drop);
			to_drop = to_drop & ~slice
		}
	:: atomic { host_up && slice -> drop(slice); slice = 0 }
	:: atomic { host_up && running && !slice && (!to_drop || !permit) ->
			to_drop = 0;
			permit = false;
			running = false;
			q_epoch = running_epoch;
			q_seq = running_seq;
			running_epoch = 0;
			running_seq = 0;
			acknowledge();
			welcome_if_nothing_runs();
			q_epoch = 0; q_seq = 0
		}
	/* QEMU asks to stop the guest: the epoch ends; QEMU is answered when no slice is inside. */
	:: atomic { host_up && qemu == ASKS && fence ->
			fence = false;
			permit = false;
			if
			:: EPOCH_OUTLIVES_THE_STOP
			:: else -> end_session()
			fi
		}
	:: atomic { host_up && qemu == ASKS && !fence &&
		    (!slice || ANSWERS_BEFORE_THE_PUNCH_IS_OVER) ->
			qemu = STOPPED
		}
	/* The guest goes on: QEMU starts the device again. */
	:: atomic { host_up && qemu == STOPPED ->
			go_on();
			fence = true;
			welcome_if_nothing_runs()
		}
	/* The driver reports that the guest is gone; then its RAM is closed. */
	:: atomic { host_up && reset && state != GONE ->
			end_session();
			state = GONE
		}
	:: atomic { host_up && state == GONE && ram_open &&
		    (!running || CLOSES_RAM_UNDER_A_PUNCH) -> ram_open = false }
	/* The host agent dies; the kernel finishes its current system call later. */
	:: atomic { host_up && faults ->
			faults--;
			host_up = false;
			predecessor = slice;
			slice = 0;
			permit = false;
			running = false; running_epoch = 0; running_seq = 0; to_drop = 0;
			drain(waiting);
			session = NOBODY;
			s = 0;
			do
			:: s < STREAMS -> die(s); s++
			:: else -> s = 0; break
			od
		}
	:: atomic { predecessor -> drop(predecessor); predecessor = 0 }
	/* The next host agent: it holds the lock, so its predecessor is really dead. It
	 * adopts the guest if that runs. */
	:: atomic { !host_up && (!predecessor || NEXT_HOST_AGENT_DOES_NOT_WAIT) ->
			state = (reset -> GONE : CLOSED);
			fence = (qemu == RUNS);
			host_up = true
		}
	od
}

/* ----------------------------------------------------------------- the rest */

inline break_link(s)
{
	atomic { faults && s < streams && !cut[s] -> faults--; cut[s] = true }
}

inline lose(s)
{
	atomic { s < streams && cut[s] && nempty(to_host[s]) -> drain_link(to_host[s]) }
}

proctype Link()
{
end:	do
	EACH(break_link)
	EACH(lose)
	/* The guest is destroyed, without being asked. All of its memory is gone, or (a mutation)
	 * none, as if it had been reset without the memory door. */
	:: atomic { faults && !reset -> faults--; reset = true; isolated = 0 }
	:: atomic { faults && !reset && qemu == RUNS -> faults--; qemu = ASKS }
	/* Nobody is at the door: the socket of a dead process is closed after its last system call. */
	:: atomic { qemu == ASKS && !host_up && !predecessor -> qemu = STOPPED }
	:: atomic { qemu == STOPPED && !host_up -> go_on() }
	od
}

init
{
	atomic {
		run Host();
		run Link();
		run Agent(0);
		run Agent(1)
	};
	/*
	 * Every step uses up something bounded, so every run ends. When no step is left,
	 * the guest has all of its memory back.
	 */
	timeout -> invariant(reset || !isolated)
}
