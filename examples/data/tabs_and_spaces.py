"""One block is indented by a tab, its next line by eight spaces."""


def total(values):
    if values:
	first = values[0]
        return first + sum(values[1:])
    return 0
