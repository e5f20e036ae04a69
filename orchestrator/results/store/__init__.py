"""Stores results on disk, safe against a crash at any moment.

    <data dir>/hintfleet.sqlite                         runs, trials, events, footprints
    <data dir>/samples/<run>/<trial>/000001.parquet     samples, in parts
    <data dir>/samples/<run>/lock                       held by the process that runs it

Acknowledged data survives any crash. An event is acknowledged when `append` returns: its row
is committed. Samples are acknowledged by a row in `parts`, which is committed after their
part. A part gets its name only when it is whole and on disk. A trial's figures are stored in
one transaction with its end.
"""
