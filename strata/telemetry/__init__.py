"""What a process reports about itself: metrics, GPU and host readings, TensorBoard."""
