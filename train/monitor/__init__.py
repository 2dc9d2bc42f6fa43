"""What a run measures about itself: time, bottleneck, cost, health."""
