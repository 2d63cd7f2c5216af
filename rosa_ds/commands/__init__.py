"""What users type: ``rosa-ds COMMAND``, one module a command, each with ``main(arguments)``."""
