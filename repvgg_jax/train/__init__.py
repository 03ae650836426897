"""Training: settings, task, step, loop, checkpoints and reports.

Everything inside the step is a pure function of its arguments. The files of a run are read and
written by `checkpoint`, `manifest`, `restore`, `workdir`, `scales`, `metrics`, `tensorboard`,
`report`, `findings` and `by_class`.
"""
