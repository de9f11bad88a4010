"""What one would write instead of TetriServe: a diffusers pipeline behind FastAPI, one request at a time.

python benchmarks/plain_server.py MODEL_DIR [--port 8001] [--threads 2] [--text-tokens 64] [--device cuda]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import time
from typing import Any

import torch
import uvicorn
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from transformers.utils import logging as transformers_logging


class ImagesRequest(BaseModel):
    """Fields that are not here, deadlines among them, are ignored."""

    model_config = ConfigDict(extra="ignore")

    prompt: str
    size: str = "512x512"
    seed: int = 0
    num_inference_steps: int = 20


def make_app(pipeline: Any, num_text_tokens: int) -> FastAPI:
    app = FastAPI()
    lock = asyncio.Lock()

    def draw(body: ImagesRequest) -> str:
        width, height = map(int, body.size.split("x"))
        image = pipeline(
            body.prompt,
            width=width,
            height=height,
            num_inference_steps=body.num_inference_steps,
            max_sequence_length=num_text_tokens,
            generator=torch.Generator().manual_seed(body.seed),
        ).images[0]
        file = io.BytesIO()
        image.save(file, "png", compress_level=1)  # as TetriServe does
        return base64.b64encode(file.getvalue()).decode("ascii")

    @app.post("/v1/images/generations")
    async def generate_images(body: ImagesRequest) -> dict[str, Any]:
        async with lock:  # the pipeline keeps its scheduler's state: two calls at once would mix
            picture = await asyncio.to_thread(draw, body)
        return {"created": int(time.time()), "data": [{"b64_json": picture}]}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "plain", "object": "model"}]}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory of a diffusers checkpoint")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of torch")
    parser.add_argument("--text-tokens", type=int, default=64, help="length of the prompt's embedding")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    pipeline = DiffusionPipeline.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    uvicorn.run(make_app(pipeline, options.text_tokens), port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
