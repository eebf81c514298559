"""fanout's scheduler: the one process that decides. It never runs or unpickles user code."""
