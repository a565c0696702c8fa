"""Training: projector pretraining, full fine-tuning and LoRA on conversation data."""
