"""Bytes of a rank and of a step's communication: estimated before a run, measured in one."""
