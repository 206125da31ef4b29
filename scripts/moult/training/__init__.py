"""Training: TRL's arguments, the trainer, its checkpoints."""
