"""Pictures of mixed sizes and deadlines at once, from asyncio: `python examples/mixed_deadlines.py`."""

import asyncio

from tetriserve import Engine

WISHES = [("a green triangle", "256x256", 3.0), ("two red stars", "512x512", 8.0), ("a blue house", "1024x1024", 30.0)]


async def main() -> None:
    async with Engine(ranks=2) as engine:
        pictures = await asyncio.gather(
            *(engine.generate_async(prompt, size=size, slo_s=slo_s) for prompt, size, slo_s in WISHES)
        )
    for (prompt, size, slo_s), picture in zip(WISHES, pictures, strict=True):
        outcome = picture.outcome
        print(f"{prompt:18} {size:9} {outcome.latency_s:6.2f} s of {slo_s:g} s, degrees {sorted(set(outcome.degrees))}")


if __name__ == "__main__":
    asyncio.run(main())
