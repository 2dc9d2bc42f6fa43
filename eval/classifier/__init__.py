"""A classifier on an encoder: the linear probe with augmentation, and finetuning."""
