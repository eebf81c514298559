"""Classes that live in a script: in arguments, results and exceptions."""

import sys
from dataclasses import dataclass

import fanout

app = fanout.App("shapes")


@dataclass
class Square:
    side: int


class BadShape(Exception):
    def __init__(self, sides: int) -> None:
        super().__init__(sides)
        self.sides = sides


@app.function()
def area(shape: Square) -> Square:
    if not isinstance(shape, Square):
        raise TypeError(f"the container sees another class: {type(shape)}")
    if shape.side < 0:
        raise BadShape(4)
    return Square(shape.side**2)


def main() -> None:
    with app.run():
        if type(area.remote(Square(2))) is not Square:
            sys.exit("a result is of another class")
        if [type(shape) for shape in area.map([Square(1), Square(2)])] != [Square, Square]:
            sys.exit("a result of a map is of another class")
        try:
            area.remote(Square(-1))
        except BadShape as error:
            if error.sides != 4:
                sys.exit("the exception lost its state")
        calls = [area.spawn(Square(3)), area.spawn(Square(-1))]
    sys.stdout.write(" ".join(call.object_id for call in calls))


if __name__ == "__main__":
    main()
