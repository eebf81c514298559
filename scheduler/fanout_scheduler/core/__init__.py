"""The sans-IO core of the scheduler: facts in, orders out."""
