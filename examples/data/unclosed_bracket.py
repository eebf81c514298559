"""The list below is never closed, so the parser reaches the end of the file inside it."""

PRIMES = [2, 3, 5, 7,

def largest():
    return max(PRIMES)
