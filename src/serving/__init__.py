"""RunPod's loop around the worker: many jobs in hand, one at a time on the device, and its log."""
