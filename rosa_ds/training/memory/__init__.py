"""How many bytes a run holds and sends: predicted from its shapes, traced without numbers, and measured beside it."""
