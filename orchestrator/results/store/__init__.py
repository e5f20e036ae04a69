"""Stores results on disk, safe against a crash at any moment.

    <data dir>/hintfleet.sqlite                         runs, trials, events, footprints
    <data dir>/samples/<run>/<trial>/000001.parquet     samples, in parts
    <data dir>/samples/<run>/lock                       locked by the process that runs the run

Acknowledged data survives any crash. An event is acknowledged when `RunWriter.append` returns:
its row is committed. Samples are acknowledged by a row in the table `parts`, which is committed
after the part with these samples is on disk. A part gets its name only when it is whole and on
disk. A trial's figures and its end are stored in one transaction.
"""
