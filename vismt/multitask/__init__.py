"""Vision multi-task learning: EMTAL (MoEfied LoRA, router fading, quality retaining) and loss balancing."""
