"""What every room uses and that knows nothing of training: files, logs, errors, seeds."""
