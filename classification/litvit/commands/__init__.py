"""The command lines, one module each with `main(argv)`. `litvit.__main__` has the table of them."""

from litvit import models  # noqa: F401 - registers them with timm: `litvit COMMAND` leaves it to this package
