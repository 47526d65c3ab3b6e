"""From an image to an endpoint on RunPod: what it costs, what it is set to, how it is made; knows nothing of torch.

model + card + settings  ->  a plan of memory, seconds, price  ->  a template and an endpoint  ->  RunPod
"""
