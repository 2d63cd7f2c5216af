"""What a run is: one typed tree of settings, the command line, and what becomes of a DeepSpeed file."""
