BEGIN TRANSACTION;
CREATE TABLE events (
        event_id INTEGER PRIMARY KEY,
        trial_id TEXT NOT NULL REFERENCES trials,
        host TEXT NOT NULL,
        at_unix_us INTEGER NOT NULL,
        kind TEXT NOT NULL,
        detail TEXT NOT NULL
    ) STRICT;
INSERT INTO "events" VALUES(3,'01stored-bitmap-1','host1',4000000,'HostDone','{"host": "host1", "trial_id": "01stored-bitmap-1", "at_unix_us": 4000000, "undecided": "host1: gone", "lost": true}');
INSERT INTO "events" VALUES(6,'01stored-bitmap-1','host2',4000000,'HostDone','{"host": "host2", "trial_id": "01stored-bitmap-1", "at_unix_us": 4000000, "undecided": "host2: gone", "lost": true}');
INSERT INTO "events" VALUES(10,'01stored-none-1','host1',4000000,'HostDone','{"host": "host1", "trial_id": "01stored-none-1", "at_unix_us": 4000000, "undecided": "", "lost": false}');
INSERT INTO "events" VALUES(14,'01stored-none-1','host2',4000000,'HostDone','{"host": "host2", "trial_id": "01stored-none-1", "at_unix_us": 4000000, "undecided": "", "lost": false}');
INSERT INTO "events" VALUES(18,'01stored-none-2','host1',4000000,'HostDone','{"host": "host1", "trial_id": "01stored-none-2", "at_unix_us": 4000000, "undecided": "", "lost": false}');
INSERT INTO "events" VALUES(22,'01stored-none-2','host2',4000000,'HostDone','{"host": "host2", "trial_id": "01stored-none-2", "at_unix_us": 4000000, "undecided": "", "lost": false}');
INSERT INTO "events" VALUES(26,'01stored-wrong-1','host1',4000000,'HostDone','{"host": "host1", "trial_id": "01stored-wrong-1", "at_unix_us": 4000000, "undecided": "", "lost": false}');
INSERT INTO "events" VALUES(30,'01stored-wrong-1','host2',4000000,'HostDone','{"host": "host2", "trial_id": "01stored-wrong-1", "at_unix_us": 4000000, "undecided": "", "lost": false}');
INSERT INTO "events" VALUES(34,'01stored-bitmap-2','host1',4000000,'HostDone','{"host": "host1", "trial_id": "01stored-bitmap-2", "at_unix_us": 4000000, "undecided": "", "lost": false}');
INSERT INTO "events" VALUES(38,'01stored-bitmap-2','host2',4000000,'HostDone','{"host": "host2", "trial_id": "01stored-bitmap-2", "at_unix_us": 4000000, "undecided": "", "lost": false}');
INSERT INTO "events" VALUES(41,'01stored-reported-1','host1',4000000,'HostDone','{"host": "host1", "trial_id": "01stored-reported-1", "at_unix_us": 4000000, "undecided": "host1: gone", "lost": false}');
INSERT INTO "events" VALUES(44,'01stored-reported-1','host2',4000000,'HostDone','{"host": "host2", "trial_id": "01stored-reported-1", "at_unix_us": 4000000, "undecided": "host2: gone", "lost": false}');
INSERT INTO "events" VALUES(48,'01stored-bitmap-1.2','host1',4000000,'HostDone','{"host": "host1", "trial_id": "01stored-bitmap-1.2", "at_unix_us": 4000000, "undecided": "", "lost": false}');
INSERT INTO "events" VALUES(52,'01stored-bitmap-1.2','host2',4000000,'HostDone','{"host": "host2", "trial_id": "01stored-bitmap-1.2", "at_unix_us": 4000000, "undecided": "", "lost": false}');
INSERT INTO "events" VALUES(55,'01stored-wrong-2','host1',4000000,'HostDone','{"host": "host1", "trial_id": "01stored-wrong-2", "at_unix_us": 4000000, "undecided": "host1: gone", "lost": true}');
INSERT INTO "events" VALUES(58,'01stored-wrong-2','host2',4000000,'HostDone','{"host": "host2", "trial_id": "01stored-wrong-2", "at_unix_us": 4000000, "undecided": "host2: gone", "lost": true}');
CREATE TABLE footprints (
        trial_id TEXT NOT NULL REFERENCES trials,
        host TEXT NOT NULL,
        guest TEXT NOT NULL,
        footprint TEXT,
        undecided TEXT NOT NULL DEFAULT '', cost TEXT,
        PRIMARY KEY (trial_id, host, guest)
    ) STRICT;
INSERT INTO "footprints" VALUES('01stored-bitmap-1','host1','',NULL,'host1: gone',NULL);
INSERT INTO "footprints" VALUES('01stored-bitmap-1','host1','host1-guest1',NULL,'host1: gone',NULL);
INSERT INTO "footprints" VALUES('01stored-bitmap-1','host2','',NULL,'host2: gone',NULL);
INSERT INTO "footprints" VALUES('01stored-bitmap-1','host2','host2-guest1',NULL,'host2: gone',NULL);
INSERT INTO "footprints" VALUES('01stored-none-1','host1','','{"provisioned_bytes": 268435456, "peak_resident_bytes": 104857600.0, "mean_resident_bytes": 104857600.0, "resident_gib_min": 0.0032552083333333335, "reclaimed_now_bytes": 0, "refaulted_total_bytes": 0, "verified_pages": 2, "wrong_pages": 0, "returned": null}','','{"settle_s": [], "asked_settle_s": [], "step_s": 0.0, "agent_cpu_s": 2.0, "process_cpu_s": 2.0, "host_agent_cpu_s": 0.0, "wire_bytes": 2000000, "ranges": 2000000, "tracker_bytes": 3900000, "observing_cpu_s": 2.0}');
INSERT INTO "footprints" VALUES('01stored-none-1','host1','host1-guest1','{"provisioned_bytes": 268435456, "peak_resident_bytes": 104857600.0, "mean_resident_bytes": 104857600.0, "resident_gib_min": 0.0032552083333333335, "reclaimed_now_bytes": 0, "refaulted_total_bytes": 0, "verified_pages": 2, "wrong_pages": 0, "returned": null}','',NULL);
INSERT INTO "footprints" VALUES('01stored-none-1','host2','','{"provisioned_bytes": 268435456, "peak_resident_bytes": 104857600.0, "mean_resident_bytes": 104857600.0, "resident_gib_min": 0.0032552083333333335, "reclaimed_now_bytes": 0, "refaulted_total_bytes": 0, "verified_pages": 2, "wrong_pages": 0, "returned": null}','','{"settle_s": [], "asked_settle_s": [], "step_s": 0.0, "agent_cpu_s": 2.0, "process_cpu_s": 2.0, "host_agent_cpu_s": 0.0, "wire_bytes": 2000000, "ranges": 2000000, "tracker_bytes": 3900000, "observing_cpu_s": 2.0}');
INSERT INTO "footprints" VALUES('01stored-none-1','host2','host2-guest1','{"provisioned_bytes": 268435456, "peak_resident_bytes": 104857600.0, "mean_resident_bytes": 104857600.0, "resident_gib_min": 0.0032552083333333335, "reclaimed_now_bytes": 0, "refaulted_total_bytes": 0, "verified_pages": 2, "wrong_pages": 0, "returned": null}','',NULL);
INSERT INTO "footprints" VALUES('01stored-none-2','host1','','{"provisioned_bytes": 268435456, "peak_resident_bytes": 105906176.0, "mean_resident_bytes": 105906176.0, "resident_gib_min": 0.0032877604166666667, "reclaimed_now_bytes": 0, "refaulted_total_bytes": 0, "verified_pages": 2, "wrong_pages": 0, "returned": null}','','{"settle_s": [], "asked_settle_s": [], "step_s": 0.0, "agent_cpu_s": 2.0, "process_cpu_s": 2.0, "host_agent_cpu_s": 0.0, "wire_bytes": 2000000, "ranges": 2000000, "tracker_bytes": 3900000, "observing_cpu_s": 2.0}');
INSERT INTO "footprints" VALUES('01stored-none-2','host1','host1-guest1','{"provisioned_bytes": 268435456, "peak_resident_bytes": 105906176.0, "mean_resident_bytes": 105906176.0, "resident_gib_min": 0.0032877604166666667, "reclaimed_now_bytes": 0, "refaulted_total_bytes": 0, "verified_pages": 2, "wrong_pages": 0, "returned": null}','',NULL);
INSERT INTO "footprints" VALUES('01stored-none-2','host2','','{"provisioned_bytes": 268435456, "peak_resident_bytes": 105906176.0, "mean_resident_bytes": 105906176.0, "resident_gib_min": 0.0032877604166666667, "reclaimed_now_bytes": 0, "refaulted_total_bytes": 0, "verified_pages": 2, "wrong_pages": 0, "returned": null}','','{"settle_s": [], "asked_settle_s": [], "step_s": 0.0, "agent_cpu_s": 2.0, "process_cpu_s": 2.0, "host_agent_cpu_s": 0.0, "wire_bytes": 2000000, "ranges": 2000000, "tracker_bytes": 3900000, "observing_cpu_s": 2.0}');
INSERT INTO "footprints" VALUES('01stored-none-2','host2','host2-guest1','{"provisioned_bytes": 268435456, "peak_resident_bytes": 105906176.0, "mean_resident_bytes": 105906176.0, "resident_gib_min": 0.0032877604166666667, "reclaimed_now_bytes": 0, "refaulted_total_bytes": 0, "verified_pages": 2, "wrong_pages": 0, "returned": null}','',NULL);
INSERT INTO "footprints" VALUES('01stored-wrong-1','host1','','{"provisioned_bytes": 268435456, "peak_resident_bytes": 41943040.0, "mean_resident_bytes": 41943040.0, "resident_gib_min": 0.0013020833333333333, "reclaimed_now_bytes": 0, "refaulted_total_bytes": 0, "verified_pages": 2, "wrong_pages": 0, "returned": null}','','{"settle_s": [], "asked_settle_s": [], "step_s": 0.0, "agent_cpu_s": 2.0, "process_cpu_s": 2.0, "host_agent_cpu_s": 0.0, "wire_bytes": 2000000, "ranges": 2000000, "tracker_bytes": 3900000, "observing_cpu_s": 2.0}');
INSERT INTO "footprints" VALUES('01stored-wrong-1','host1','host1-guest1','{"provisioned_bytes": 268435456, "peak_resident_bytes": 41943040.0, "mean_resident_bytes": 41943040.0, "resident_gib_min": 0.0013020833333333333, "reclaimed_now_bytes": 0, "refaulted_total_bytes": 0, "verified_pages": 2, "wrong_pages": 0, "returned": null}','',NULL);
INSERT INTO "footprints" VALUES('01stored-wrong-1','host2','','{"provisioned_bytes": 268435456, "peak_resident_bytes": 41943040.0, "mean_resident_bytes": 41943040.0, "resident_gib_min": 0.0013020833333333333, "reclaimed_now_bytes": 0, "refaulted_total_bytes": 0, "verified_pages": 2, "wrong_pages": 3, "returned": null}','','{"settle_s": [], "asked_settle_s": [], "step_s": 0.0, "agent_cpu_s": 2.0, "process_cpu_s": 2.0, "host_agent_cpu_s": 0.0, "wire_bytes": 2000000, "ranges": 2000000, "tracker_bytes": 3900000, "observing_cpu_s": 2.0}');
INSERT INTO "footprints" VALUES('01stored-wrong-1','host2','host2-guest1','{"provisioned_bytes": 268435456, "peak_resident_bytes": 41943040.0, "mean_resident_bytes": 41943040.0, "resident_gib_min": 0.0013020833333333333, "reclaimed_now_bytes": 0, "refaulted_total_bytes": 0, "verified_pages": 2, "wrong_pages": 3, "returned": null}','',NULL);
INSERT INTO "footprints" VALUES('01stored-bitmap-2','host1','','{"provisioned_bytes": 268435456, "peak_resident_bytes": 42991616.0, "mean_resident_bytes": 42991616.0, "resident_gib_min": 0.0013346354166666667, "reclaimed_now_bytes": 0, "refaulted_total_bytes": 0, "verified_pages": 2, "wrong_pages": 0, "returned": null}','','{"settle_s": [], "asked_settle_s": [], "step_s": 0.0, "agent_cpu_s": 2.0, "process_cpu_s": 2.0, "host_agent_cpu_s": 0.0, "wire_bytes": 2000000, "ranges": 2000000, "tracker_bytes": 3900000, "observing_cpu_s": 2.0}');
INSERT INTO "footprints" VALUES('01stored-bitmap-2','host1','host1-guest1','{"provisioned_bytes": 268435456, "peak_resident_bytes": 42991616.0, "mean_resident_bytes": 42991616.0, "resident_gib_min": 0.0013346354166666667, "reclaimed_now_bytes": 0, "refaulted_total_bytes": 0, "verified_pages": 2, "wrong_pages": 0, "returned": null}','',NULL);
INSERT INTO "footprints" VALUES('01stored-bitmap-2','host2','','{"provisioned_bytes": 268435456, "peak_resident_bytes": 42991616.0, "mean_resident_bytes": 42991616.0, "resident_gib_min": 0.0013346354166666667, "reclaimed_now_bytes": 0, "refaulted_total_bytes": 0, "verified_pages": 2, "wrong_pages": 0, "returned": null}','','{"settle_s": [], "asked_settle_s": [], "step_s": 0.0, "agent_cpu_s": 2.0, "process_cpu_s": 2.0, "host_agent_cpu_s": 0.0, "wire_bytes": 2000000, "ranges": 2000000, "tracker_bytes": 3900000, "observing_cpu_s": 2.0}');
INSERT INTO "footprints" VALUES('01stored-bitmap-2','host2','host2-guest1','{"provisioned_bytes": 268435456, "peak_resident_bytes": 42991616.0, "mean_resident_bytes": 42991616.0, "resident_gib_min": 0.0013346354166666667, "reclaimed_now_bytes": 0, "refaulted_total_bytes": 0, "verified_pages": 2, "wrong_pages": 0, "returned": null}','',NULL);
INSERT INTO "footprints" VALUES('01stored-reported-1','host1','',NULL,'host1: gone',NULL);
INSERT INTO "footprints" VALUES('01stored-reported-1','host1','host1-guest1',NULL,'host1: gone',NULL);
INSERT INTO "footprints" VALUES('01stored-reported-1','host2','',NULL,'host2: gone',NULL);
INSERT INTO "footprints" VALUES('01stored-reported-1','host2','host2-guest1',NULL,'host2: gone',NULL);
INSERT INTO "footprints" VALUES('01stored-bitmap-1.2','host1','','{"provisioned_bytes": 268435456, "peak_resident_bytes": 41943040.0, "mean_resident_bytes": 41943040.0, "resident_gib_min": 0.0013020833333333333, "reclaimed_now_bytes": 0, "refaulted_total_bytes": 0, "verified_pages": 2, "wrong_pages": 0, "returned": null}','','{"settle_s": [], "asked_settle_s": [], "step_s": 0.0, "agent_cpu_s": 2.0, "process_cpu_s": 2.0, "host_agent_cpu_s": 0.0, "wire_bytes": 2000000, "ranges": 2000000, "tracker_bytes": 3900000, "observing_cpu_s": 2.0}');
INSERT INTO "footprints" VALUES('01stored-bitmap-1.2','host1','host1-guest1','{"provisioned_bytes": 268435456, "peak_resident_bytes": 41943040.0, "mean_resident_bytes": 41943040.0, "resident_gib_min": 0.0013020833333333333, "reclaimed_now_bytes": 0, "refaulted_total_bytes": 0, "verified_pages": 2, "wrong_pages": 0, "returned": null}','',NULL);
INSERT INTO "footprints" VALUES('01stored-bitmap-1.2','host2','','{"provisioned_bytes": 268435456, "peak_resident_bytes": 41943040.0, "mean_resident_bytes": 41943040.0, "resident_gib_min": 0.0013020833333333333, "reclaimed_now_bytes": 0, "refaulted_total_bytes": 0, "verified_pages": 2, "wrong_pages": 0, "returned": null}','','{"settle_s": [], "asked_settle_s": [], "step_s": 0.0, "agent_cpu_s": 2.0, "process_cpu_s": 2.0, "host_agent_cpu_s": 0.0, "wire_bytes": 2000000, "ranges": 2000000, "tracker_bytes": 3900000, "observing_cpu_s": 2.0}');
INSERT INTO "footprints" VALUES('01stored-bitmap-1.2','host2','host2-guest1','{"provisioned_bytes": 268435456, "peak_resident_bytes": 41943040.0, "mean_resident_bytes": 41943040.0, "resident_gib_min": 0.0013020833333333333, "reclaimed_now_bytes": 0, "refaulted_total_bytes": 0, "verified_pages": 2, "wrong_pages": 0, "returned": null}','',NULL);
INSERT INTO "footprints" VALUES('01stored-wrong-2','host1','',NULL,'host1: gone',NULL);
INSERT INTO "footprints" VALUES('01stored-wrong-2','host1','host1-guest1',NULL,'host1: gone',NULL);
INSERT INTO "footprints" VALUES('01stored-wrong-2','host2','',NULL,'host2: gone',NULL);
INSERT INTO "footprints" VALUES('01stored-wrong-2','host2','host2-guest1',NULL,'host2: gone',NULL);
CREATE TABLE parts (
        trial_id TEXT NOT NULL REFERENCES trials,
        number INTEGER NOT NULL,
        row_count INTEGER NOT NULL,
        PRIMARY KEY (trial_id, number)
    ) STRICT;
INSERT INTO "parts" VALUES('01stored-bitmap-1',1,80);
INSERT INTO "parts" VALUES('01stored-none-1',1,80);
INSERT INTO "parts" VALUES('01stored-none-2',1,80);
INSERT INTO "parts" VALUES('01stored-wrong-1',1,80);
INSERT INTO "parts" VALUES('01stored-bitmap-2',1,80);
INSERT INTO "parts" VALUES('01stored-reported-1',1,80);
INSERT INTO "parts" VALUES('01stored-bitmap-1.2',1,80);
INSERT INTO "parts" VALUES('01stored-wrong-2',1,80);
CREATE TABLE runs (
        run_id TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        driver TEXT NOT NULL,
        spec_text TEXT NOT NULL,
        spec_hash TEXT NOT NULL,
        control TEXT,
        summary TEXT NOT NULL,
        started_unix_us INTEGER NOT NULL,
        ended_unix_us INTEGER NOT NULL DEFAULT 0,
        state TEXT NOT NULL,
        reason TEXT NOT NULL DEFAULT ''
    , environment TEXT NOT NULL DEFAULT '{}', overrides TEXT NOT NULL DEFAULT '{}', libvirt_uri TEXT NOT NULL DEFAULT '') STRICT;
INSERT INTO "runs" VALUES('01stored','stored','embedded','name: stored
driver: embedded
hosts: {count: 2, memory: 256MiB}
guests: {per_host: 1, memory: 64MiB}
workload:
  phases:
    - {allocate: 40MiB, for: 1s}
arms:
  - {name: none, method: none}
  - {name: bitmap, method: hinting, tracker: bitmap, policy: eager}
  - {name: reported, method: hinting, tracker: reported, policy: eager}
  - {name: wrong, method: hinting, tracker: bitmap, chunk_order: 8, policy: eager}
repetitions: 2
seed: 1
sample_period: 100ms
','038e44e21b221ef3','none','a run of the version before',500000,10000000,'interrupted','interrupted by the user','{"kernel": "Linux"}','{}','');
CREATE TABLE trials (
        trial_id TEXT PRIMARY KEY,
        run_id TEXT NOT NULL REFERENCES runs,
        position INTEGER NOT NULL,
        arm TEXT NOT NULL,
        repetition INTEGER NOT NULL,
        started_unix_us INTEGER NOT NULL,
        ended_unix_us INTEGER NOT NULL DEFAULT 0,
        undecided TEXT NOT NULL DEFAULT ''
    , arm_position INTEGER NOT NULL DEFAULT 0, attempt INTEGER NOT NULL DEFAULT 1, lost INTEGER NOT NULL DEFAULT 0) STRICT;
INSERT INTO "trials" VALUES('01stored-bitmap-1','01stored',2,'bitmap',0,1000000,1500000,'host1: gone',1,1,1);
INSERT INTO "trials" VALUES('01stored-none-1','01stored',1,'none',0,2000000,2500000,'',0,1,0);
INSERT INTO "trials" VALUES('01stored-none-2','01stored',6,'none',1,3000000,3500000,'',0,1,0);
INSERT INTO "trials" VALUES('01stored-wrong-1','01stored',0,'wrong',0,4000000,4500000,'host2-guest1: 3 pages came back wrong',3,1,0);
INSERT INTO "trials" VALUES('01stored-bitmap-2','01stored',5,'bitmap',1,5000000,5500000,'',1,1,0);
INSERT INTO "trials" VALUES('01stored-reported-1','01stored',3,'reported',0,6000000,6500000,'host1: gone',2,1,0);
INSERT INTO "trials" VALUES('01stored-bitmap-1.2','01stored',2,'bitmap',0,7000000,7500000,'',1,2,0);
INSERT INTO "trials" VALUES('01stored-wrong-2','01stored',4,'wrong',1,8000000,8500000,'host1: gone',3,1,1);
INSERT INTO "trials" VALUES('01stored-reported-2','01stored',7,'reported',1,9000000,0,'',2,1,0);
CREATE INDEX trials_by_run ON trials (run_id, position);
CREATE INDEX events_by_trial ON events (trial_id, host);
CREATE VIEW counted_trials AS SELECT * FROM trials AS t WHERE NOT EXISTS (
        SELECT 1 FROM trials AS later WHERE later.run_id = t.run_id
        AND later.position = t.position AND later.attempt > t.attempt
    );
COMMIT;
PRAGMA user_version = 3;
