"""The state of a run on the disk: our checkpoints, DeepSpeed's, and the folder that holds them."""
