"""Training: settings, presets, the trainer, stopping rules, checkpoints and Hub hooks."""
