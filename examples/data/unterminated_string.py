"""The string in the last line has no closing quote."""

GREETING = "hello
