"""Pictures -> files -> a response that RunPod can carry. Knows nothing of how pictures are made."""
