"""fanout's worker: the daemon on a host that owns its resources and containers."""
