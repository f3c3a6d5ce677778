"""Fine-tuning of the hybrid: tokens with a loss mask, TRL's trainer, LoRA on the lazy layers, checkpoints for a killed run."""
