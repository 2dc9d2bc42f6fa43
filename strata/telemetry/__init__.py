"""Reports of a process about itself: metrics, GPU and host readings, TensorBoard."""
