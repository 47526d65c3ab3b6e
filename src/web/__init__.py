"""RunPod's routes and OpenAI's over HTTP, and the page that speaks them.

Knows nothing of RunPod's loop; what answers is handed in.
"""
