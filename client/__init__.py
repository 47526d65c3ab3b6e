"""Many requests to one endpoint on RunPod, under its limits: from a program, or by `python -m client.batch`.

    from client import Client

    with Client("ENDPOINT_ID") as client:              # the API key is RUNPOD_API_KEY
        pictures = client.generate({"prompt": "a red star"})
        pictures[0].image.show()                       # .file has its bytes, .seed its seed
        for pictures in client.map({"prompt": f"a {colour} star"} for colour in ("red", "green", "blue")):
            print(pictures.metadata["seeds"])

AsyncClient is the same for asyncio. Nothing here knows of torch; a request is what docs/api.md says.
"""

from client.client import AsyncClient, Client
from client.errors import ClientError, EndpointFailing, EndpointUnusable, Forgotten, JobFailed, Unreachable
from client.pictures import Picture, Pictures
from client.transport import Transport

__all__ = [
    "AsyncClient",
    "Client",
    "ClientError",
    "EndpointFailing",
    "EndpointUnusable",
    "Forgotten",
    "JobFailed",
    "Picture",
    "Pictures",
    "Transport",
    "Unreachable",
]
