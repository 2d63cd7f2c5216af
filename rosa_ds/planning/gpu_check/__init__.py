"""Everything that one command can find out on a machine with a GPU: ``rosa-ds doctor --gpu OUT``.

``runner`` starts one process a stage and ends it at its deadline, ``stages`` lists the stages, ``report`` writes what they
find as they find it. The other files are the stages themselves.
"""
