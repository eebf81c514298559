"""The child side of the worker: what runs in templates and containers, beside user code."""
