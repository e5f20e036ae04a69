"""Host agents and guests' agents with planted bugs. A test requires that torture finds two of them,
`no_fence` and `early_release`. Torture finds `no_door_fence` in some runs only (docs/torture.md).
`slow_punch` is no bug: it only punches slowly."""
