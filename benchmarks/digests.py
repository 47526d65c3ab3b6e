"""Are pictures still the same, byte for byte? The digests of forty requests' files, kept in a file or compared with it.

    python -m benchmarks.digests before.json    # writes it; then, on the changed code, compares

The requests go over modes, formats, schedulers and what else changes a picture, on the shipped model. Digests hold for
one kind of processor and one version of torch: compare on the machine that wrote them.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent


def _base64(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _pictures() -> dict[str, str]:
    """A scene with noise, a mask and its edges; 136x104."""
    scene = Image.new("RGB", (136, 104), "orange")
    ImageDraw.Draw(scene).ellipse((30, 20, 100, 90), fill="green")
    noise = np.random.default_rng(0).integers(-20, 20, (104, 136, 3))
    scene = Image.fromarray((np.asarray(scene, int) + noise).clip(0, 255).astype(np.uint8))
    mask = Image.new("L", scene.size)
    ImageDraw.Draw(mask).rectangle((40, 30, 90, 80), fill=255)
    edges = Image.new("RGB", scene.size)
    ImageDraw.Draw(edges).ellipse((30, 20, 100, 90), outline="white")
    return {"scene": _base64(scene), "mask": _base64(mask), "edges": _base64(edges)}


def requests() -> dict[str, dict[str, Any]]:
    """Forty of them, by what they are about; the seed is 7 where it says no other."""
    p = _pictures()
    scene, mask, edges = p["scene"], p["mask"], p["edges"]
    modes: dict[str, dict[str, Any]] = {
        "text-to-image": {},
        "image-to-image": {"init_image": scene, "strength": 0.6},
        "inpainting": {"init_image": scene, "mask_image": mask},
        "controlnet": {"control_image": edges, "control_type": "canny"},
        "controlnet-image-to-image": {"init_image": scene, "control_image": edges},
        "controlnet-inpainting": {"init_image": scene, "mask_image": mask, "control_image": edges},
    }
    schedulers = (
        "euler", "euler_beta", "euler_exponential", "euler_karras", "dpmpp_2m", "unipc", "deis", "heun", "lcm",
    )  # fmt: skip
    return {
        **modes,
        **{f"{mode}, JPEG": {**fields, "output_format": "JPEG"} for mode, fields in modes.items()},
        **{
            f"{mode}, WEBP": {**fields, "output_format": "webp", "output_quality": 80}
            for mode, fields in modes.items()
        },
        **{name: {"scheduler": name} for name in schedulers},
        "four pictures": {"num_images": 4, "seed": 2**63 - 2},
        "two prompts": {"prompt": ["a red star on black", "a blue square on white"]},
        "negative prompt": {"negative_prompt": "a blue square", "true_cfg_scale": 3, "prompt_2": "a red circle"},
        "odd size": {"width": 136, "height": 72, "guidance_scale": 2, "max_sequence_length": 20},
        "shape": {"aspect_ratio": "16:9", "megapixels": 0.02},
        "sigmas and shift": {"sigmas": [1, 0.8, 0.5, 0.2], "shift": 3},
        "fast": {"speed": "fast", "num_inference_steps": 12},
        "adapter": {"lora_path": "pytorch_lora_weights.safetensors", "lora_scale": 0.9},
        "adapters": {"loras": [{"path": "pytorch_lora_weights.safetensors", "scale": 0.5}], "scheduler": "heun"},
        "outpaint": {"init_image": scene, "outpaint": {"left": 30, "bottom": 10}, "strength": 0.9},
        "mask not kept": {"image": scene, "mask": mask, "preserve_unmasked": False},
        "preprocessed": {"controls": [{"image": scene, "type": "canny", "scale": 0.5, "preprocess": True}]},
        "other names": {"inputs": "a red star", "parameters": {"n": 2, "steps": 4, "size": "96x128", "quality": 70}},
    }  # fmt: skip


def digests() -> dict[str, list[str]]:
    """SHA-256 of each picture's file, by the request's name."""
    os.environ |= {"MODEL_NAME": "flux-shapes", "LORA_DIR": str(ROOT / "models" / "flux-shapes-outline")}
    from handler import handler

    found = {}
    for name, fields in requests().items():
        prompt = {} if "inputs" in fields else {"prompt": "a green circle on an orange background"}
        response = handler({"id": name, "input": {**prompt, "seed": 7, **fields}})
        assert response["status"] == "success", (name, response["error"])
        found[name] = [hashlib.sha256(base64.b64decode(text)).hexdigest() for text in response["images"]]
    return found


def main() -> int:
    """Exit status: 1 where a picture is another one now."""
    file = Path(sys.argv[1])
    found = digests()
    if not file.exists():
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{len(found)} requests, {sum(map(len, found.values()))} pictures: written to {file}")
        return 0
    before = json.loads(file.read_text())
    changed = [name for name in {**before, **found} if before.get(name) != found.get(name)]
    print(f"{len(found)} requests, {len(changed)} of them changed: {', '.join(changed) or 'none'}")
    return bool(changed)


if __name__ == "__main__":
    sys.exit(main())
