"""Training: settings, task, step, loop, checkpoints and reports.

Below `loop` everything is a pure function of its arguments; only `checkpoint`, `workdir`,
`metrics` and `report` touch the disk.
"""
