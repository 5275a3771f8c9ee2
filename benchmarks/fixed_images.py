"""Hash the images of 24 fixed requests, to compare two versions of Glimmer.

    glimmer serve --port 8000 &
    python -m benchmarks.fixed_images                   # one request at a time
    python -m benchmarks.fixed_images --concurrency 8   # the same hash: an image does not depend on its batch

The output is a hash per request and one of all. It holds for one checkpoint, one number of threads and one kind of CPU.
"""

import argparse
import base64
import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from PIL import Image, ImageDraw

POSTER = 'a blue poster, top headline "GLIMMER", center a large yellow star, bottom footer "HELLO" on a red bar'
SALE = 'white poster, title "SALE", a red heart and a black ring, bottom text "TODAY" on an orange band'
QUOTES = "\u00fcber \u300c\u6587\u300d \u201cCURLY\u201d 'single'"
PLAN = {"rows": 4, "cols": 6, "tokens": [(7 * i) % 500 for i in range(24)]}

GENERATIONS: list[dict[str, Any]] = [
    {"prompt": POSTER},
    {"prompt": POSTER, "seed": 2, "size": "256x256", "num_inference_steps": 4},
    {"prompt": SALE, "seed": 3, "size": "384x256", "num_inference_steps": 6},
    {"prompt": SALE, "seed": 4, "size": "128x256", "num_inference_steps": 4},
    {"prompt": "a circle, no text", "seed": 5, "size": "64x64", "num_inference_steps": 3},
    {"prompt": 'wide "ONE" "TWO"', "seed": 6, "size": "512x128", "num_inference_steps": 4},
    {"prompt": POSTER, "seed": 7, "size": "333x200", "num_inference_steps": 5},
    {"prompt": POSTER, "seed": 8, "size": "512x512", "num_inference_steps": 3},
    {"prompt": SALE, "seed": 9, "size": "256x256", "n": 3, "num_inference_steps": 3},
    {"prompt": SALE, "seed": 10, "size": "256x256", "guidance_scale": 1.0, "num_inference_steps": 4},
    {"prompt": SALE, "seed": 11, "size": "256x256", "guidance_scale": 6.5, "num_inference_steps": 4},
    {"prompt": SALE, "seed": 12, "size": "256x256", "negative_prompt": 'no "WORDS"', "num_inference_steps": 4},
    {"prompt": POSTER, "seed": 13, "size": "256x256", "temperature": 0.0, "num_inference_steps": 4},
    {"prompt": POSTER, "seed": 14, "size": "256x256", "temperature": 1.5, "top_p": 0.95, "num_inference_steps": 4},
    {"prompt": POSTER, "seed": 15, "size": "256x256", "embed_prompt": True, "num_inference_steps": 4},
    {"prompt": POSTER, "seed": 16, "size": "256x256", "quality": "low"},
    {"prompt": QUOTES, "seed": 17, "size": "256x128", "num_inference_steps": 4},
    {"prompt": SALE, "seed": 18, "size": "256x256", "partial_images": 2, "stream": True, "num_inference_steps": 6},
    {"prompt": SALE, "seed": 19, "size": "192x128", "plan": PLAN, "num_inference_steps": 4},
]  # fmt: skip
EDITS: list[dict[str, Any]] = [
    {"prompt": "make the background green", "sources": 1, "seed": 21, "num_inference_steps": 4},
    {"prompt": "make the background green", "sources": 1, "seed": 22, "size": "192x192", "num_inference_steps": 4},
    {"prompt": 'write "NEW" as the bottom footer', "sources": 2, "seed": 23, "num_inference_steps": 4},
    {"prompt": "make the star red", "sources": 1, "mask": True, "seed": 24, "num_inference_steps": 4},
    {"prompt": "make the star red", "sources": 3, "seed": 25, "n": 2, "num_inference_steps": 3},
]


def png(image: Image.Image) -> str:
    """Return the image as a data URL."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def source(number: int) -> str:
    """Return drawing `number` (0 to 2) as a data URL."""
    image = Image.new("RGB", (256, 192 + 64 * number), ("navy", "white", "teal")[number])
    ImageDraw.Draw(image).ellipse((60, 40, 180, 160), fill=("yellow", "red", "black")[number])
    return png(image)


def mask() -> str:
    """Return a mask for source 0 that opens its centre."""
    image = Image.new("RGBA", (256, 192), (0, 0, 0, 255))
    ImageDraw.Draw(image).rectangle((50, 30, 190, 170), fill=(0, 0, 0, 0))
    return png(image)


def post(client: httpx.Client, number: int, fields: dict[str, Any]) -> list[bytes]:
    """Send a request and return its PNG files."""
    body = {"seed": 1, "output_format": "png", "response_format": "b64_json"} | fields
    route = "generations"
    if count := body.pop("sources", 0):
        route = "edits"
        body["images"] = [{"image_url": source(i)} for i in range(count)]
        if body.pop("mask", False):
            body["mask"] = {"image_url": mask()}
    response = client.post(f"/v1/images/{route}", json=body)
    if response.status_code != 200:
        raise SystemExit(f"request {number}: {response.status_code} {response.text}")
    if body.get("stream"):
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        # The steps of partial images depend on what else is being rendered, so only the final one counts.
        return [base64.b64decode(event["b64_json"]) for event in events if event["type"].endswith(".completed")]
    return [base64.b64decode(image["b64_json"]) for image in response.json()["data"]]


def main() -> None:
    """Print the SHA-256 of every request's images and of all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default %(default)s)")
    parser.add_argument("--concurrency", type=int, default=1, help="requests in flight at once (default %(default)s)")
    args = parser.parse_args()
    requests = [*GENERATIONS, *EDITS]
    total = hashlib.sha256()
    with httpx.Client(base_url=args.url, timeout=600) as client, ThreadPoolExecutor(args.concurrency) as pool:
        responses = pool.map(lambda item: post(client, *item), enumerate(requests))
        for number, files in enumerate(responses):
            digest = hashlib.sha256(b"".join(files)).hexdigest()
            total.update(digest.encode())
            print(f"{number:2} {digest[:16]} {len(files)} images {requests[number]['prompt'][:60]}")
    print(f"{len(requests)} requests: {total.hexdigest()}")


if __name__ == "__main__":
    main()
