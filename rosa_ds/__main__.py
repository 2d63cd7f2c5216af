"""``python -m rosa_ds COMMAND ...``, the same as ``rosa-ds COMMAND ...``."""

from rosa_ds.commands.dispatch import main

if __name__ == "__main__":
    main()
