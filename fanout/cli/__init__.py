"""The `fanout` command: one module for each group of commands."""
