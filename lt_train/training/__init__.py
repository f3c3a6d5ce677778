"""Fine-tune the hybrid: tokens with a loss mask, TRL's trainer, LoRA on the lazy layers, checkpoints that survive a kill."""
