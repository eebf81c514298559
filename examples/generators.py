"""A generator is a function that gives many items; `map` over it is a flat map.

    fanout run examples/generators.py

Items travel as they are made, a generator that nobody reads stops by itself when its credit is
used up, and `order_outputs=True` keeps the items of each input together and in input order.
"""

from collections.abc import Iterator

import fanout

app = fanout.App("generators")


@app.function()
def prime_factors(n: int) -> Iterator[tuple[int, int]]:
    """Gives (n, factor) for each prime factor of n, the smallest first."""
    rest, divisor = n, 2
    while divisor * divisor <= rest:
        while rest % divisor == 0:
            yield n, divisor
            rest //= divisor
        divisor += 1
    if rest > 1:
        yield n, rest


@app.local_entrypoint()
def main(first: int = 2, count: int = 1000) -> None:
    numbers = range(first, first + count)
    products = dict.fromkeys(numbers, 1)
    item_count = 0
    for n, factor in prime_factors.map(numbers):
        products[n] *= factor
        item_count += 1
    correct = sum(n == product for n, product in products.items())
    print(f"{item_count} prime factors of {count} numbers")
    print(f"{correct} of {count} numbers are the product of their factors")

    print("360 =", " * ".join(str(factor) for _, factor in prime_factors.remote_gen(360)))


if __name__ == "__main__":
    with app.run():
        main()
