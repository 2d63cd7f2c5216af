"""What a method does around optimizer steps: one file a kind of work, each with a class ``Method``.

:data:`rosa_ds.config.methods.METHODS` says which of them act in a run. The training loop calls them and knows none.
"""

from rosa_ds.methods.method import Context, Method, Restart, build_methods, memory_terms
