"""Results on disk, safe against a crash at any moment.

    <data dir>/hintfleet.sqlite                         runs, trials, events, footprints
    <data dir>/samples/<run>/<trial>/000001.parquet     samples, in parts
    <data dir>/samples/<run>/lock                       held by the process that runs it

What was acknowledged stays: rows are committed before `append` returns, and a
part appears under its name only when it is whole and on disk.
"""
